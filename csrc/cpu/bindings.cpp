// The CPU kernels for Python: each takes a dtype and its struct of arguments (csrc/fields.hpp).
#include "bindings.hpp"

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../fields.hpp"
#include "kernels.hpp"
#include "memory.hpp"

namespace lora_engine {

LORA_ENGINE_FIELDS(RmsNormArgs, FIELD(x), FIELD(residual), FIELD(weight), FIELD(y), FIELD(h),
                   FIELD(rstd), FIELD(rows), FIELD(heads), FIELD(cols), FIELD(x_stride),
                   FIELD(residual_stride), FIELD(y_stride), FIELD(eps), FIELD(offset));
LORA_ENGINE_FIELDS(RmsNormBwdArgs, FIELD(dy), FIELD(dh), FIELD(h), FIELD(weight), FIELD(rstd),
                   FIELD(dx), FIELD(dweight), FIELD(rows), FIELD(heads), FIELD(cols),
                   FIELD(dy_stride), FIELD(dh_stride), FIELD(h_stride), FIELD(dx_stride),
                   FIELD(offset));
LORA_ENGINE_FIELDS(LayerNormArgs, FIELD(x), FIELD(weight), FIELD(bias), FIELD(y), FIELD(mean),
                   FIELD(rstd), FIELD(rows), FIELD(cols), FIELD(x_stride), FIELD(y_stride),
                   FIELD(eps));
LORA_ENGINE_FIELDS(LayerNormBwdArgs, FIELD(dy), FIELD(x), FIELD(weight), FIELD(mean), FIELD(rstd),
                   FIELD(dx), FIELD(dweight), FIELD(dbias), FIELD(rows), FIELD(cols),
                   FIELD(dy_stride), FIELD(x_stride), FIELD(dx_stride));
LORA_ENGINE_FIELDS(RopeHeads, FIELD(x), FIELD(y), FIELD(heads), FIELD(x_stride),
                   FIELD(x_head_stride), FIELD(y_stride), FIELD(y_head_stride));
LORA_ENGINE_FIELDS(RopeArgs, FIELD(q), FIELD(k), FIELD(cos), FIELD(sin), FIELD(position_ids),
                   FIELD(table_dtype), FIELD(tokens), FIELD(head_dim), FIELD(rotary_dim),
                   FIELD(cos_stride), FIELD(sin_stride), FIELD(interleaved), FIELD(inverse));
LORA_ENGINE_FIELDS(GluArgs, FIELD(gate), FIELD(up), FIELD(y), FIELD(rows), FIELD(cols),
                   FIELD(gate_stride), FIELD(up_stride), FIELD(y_stride), FIELD(activation));
LORA_ENGINE_FIELDS(GluBwdArgs, FIELD(dy), FIELD(gate), FIELD(up), FIELD(dgate), FIELD(dup),
                   FIELD(h), FIELD(rows), FIELD(cols), FIELD(dy_stride), FIELD(gate_stride),
                   FIELD(up_stride), FIELD(dgate_stride), FIELD(dup_stride), FIELD(h_stride),
                   FIELD(activation));
LORA_ENGINE_FIELDS(CrossEntropyArgs, FIELD(logits), FIELD(target), FIELD(loss), FIELD(logprob),
                   FIELD(entropy), FIELD(lse), FIELD(correct), FIELD(grad), FIELD(grad_scale),
                   FIELD(rows), FIELD(cols), FIELD(stride), FIELD(grad_stride), FIELD(ignore_index),
                   FIELD(label_smoothing), FIELD(softcap), FIELD(z_loss), FIELD(lse_given));
LORA_ENGINE_FIELDS(AttentionArgs, FIELD(q), FIELD(k), FIELD(v), FIELD(cos), FIELD(sin),
                   FIELD(cu_seqlens), FIELD(parents), FIELD(o), FIELD(lse), FIELD(tokens),
                   FIELD(sequences), FIELD(q_heads), FIELD(kv_heads), FIELD(head_dim),
                   FIELD(q_stride), FIELD(k_stride), FIELD(v_stride), FIELD(o_stride),
                   FIELD(window), FIELD(softmax_scale), FIELD(causal));
LORA_ENGINE_FIELDS(AttentionDecodeArgs, FIELD(q), FIELD(k), FIELD(v), FIELD(cos), FIELD(sin),
                   FIELD(keys), FIELD(values), FIELD(slots), FIELD(spans), FIELD(cu_spans),
                   FIELD(o), FIELD(sequences), FIELD(q_heads), FIELD(kv_heads), FIELD(head_dim),
                   FIELD(q_stride), FIELD(k_stride), FIELD(v_stride), FIELD(o_stride),
                   FIELD(cache_stride), FIELD(window), FIELD(softmax_scale));
LORA_ENGINE_FIELDS(AttentionBwdArgs, FIELD(fwd), FIELD(d_o), FIELD(dq), FIELD(dk), FIELD(dv),
                   FIELD(do_stride), FIELD(dq_stride), FIELD(dk_stride), FIELD(dv_stride));
LORA_ENGINE_FIELDS(AdamWArgs, FIELD(params), FIELD(grads), FIELD(exp_avg), FIELD(exp_avg_sq),
                   FIELD(size), FIELD(lr), FIELD(beta1), FIELD(beta2), FIELD(eps),
                   FIELD(weight_decay), FIELD(bias_correction1), FIELD(bias_correction2),
                   FIELD(grad_norm), FIELD(max_grad_norm));
LORA_ENGINE_FIELDS(AdamW8bitArgs, FIELD(adamw), FIELD(exp_avg_absmax), FIELD(exp_avg_sq_absmax));
LORA_ENGINE_FIELDS(GradNormArgs, FIELD(grads), FIELD(norm), FIELD(size));
LORA_ENGINE_FIELDS(DropoutArgs, FIELD(x), FIELD(y), FIELD(rows), FIELD(cols), FIELD(x_stride),
                   FIELD(y_stride), FIELD(p), FIELD(seed), FIELD(substream));
LORA_ENGINE_FIELDS(LoraAFwdArgs, FIELD(x), FIELD(lora_a), FIELD(s), FIELD(copy), FIELD(rows),
                   FIELD(cols), FIELD(x_stride), FIELD(a_stride), FIELD(s_stride),
                   FIELD(copy_stride), array("spans", &Args::spans, &Args::span_count));
LORA_ENGINE_FIELDS(LoraBBwdArgs, FIELD(dy), FIELD(lora_b), FIELD(s), FIELD(ds), FIELD(row_factors),
                   FIELD(scaled_ds), FIELD(rows), FIELD(dy_stride), FIELD(b_stride),
                   FIELD(s_stride), FIELD(ds_stride), FIELD(scaled_stride),
                   array("spans", &Args::spans, &Args::span_count),
                   array("parts", &Args::parts, &Args::part_count), FIELD(adds));
LORA_ENGINE_FIELDS(LoraABwdArgs, FIELD(ds), FIELD(x), FIELD(d_lora_a), FIELD(column_weight),
                   FIELD(rows), FIELD(cols), FIELD(ds_stride), FIELD(x_stride), FIELD(d_stride),
                   FIELD(column_offset), array("spans", &Args::spans, &Args::span_count),
                   array("parts", &Args::parts, &Args::part_count));
LORA_ENGINE_FIELDS(LoraPlacing, FIELD(factor), FIELD(dtype), FIELD(place), FIELD(rows), FIELD(cols),
                   FIELD(row_stride), FIELD(col_stride), FIELD(place_stride), FIELD(scale));
LORA_ENGINE_FIELDS(PlaceFactorsArgs, array("placings", &Args::placings, &Args::placing_count));
LORA_ENGINE_FIELDS(LoraAdapter, FIELD(lora_a), FIELD(lora_b), FIELD(dtype), FIELD(ranks),
                   FIELD(a_stride), FIELD(b_stride), FIELD(scaling));
LORA_ENGINE_FIELDS(LoraBase, FIELD(rows), FIELD(bias), FIELD(adapters));
LORA_ENGINE_FIELDS(FewRowsArgs, FIELD(x), FIELD(weight), FIELD(residual), FIELD(y), FIELD(rows),
                   FIELD(cols), FIELD(x_stride), FIELD(w_stride), FIELD(residual_stride),
                   FIELD(y_stride), array("linears", &Args::linears, &Args::linear_count),
                   array("adapters", &Args::adapters, &Args::adapter_count));
LORA_ENGINE_FIELDS(Quantize4bitArgs, FIELD(w), FIELD(bounds), FIELD(ascending), FIELD(codes),
                   FIELD(absmax), FIELD(size), FIELD(block));
LORA_ENGINE_FIELDS(Dequantize4bitArgs, FIELD(codes), FIELD(absmax), FIELD(nested_absmax),
                   FIELD(nested_code), FIELD(offset), FIELD(values), FIELD(w), FIELD(rows),
                   FIELD(cols), FIELD(stride), FIELD(first), FIELD(block));
LORA_ENGINE_FIELDS(QuantizeKArgs, FIELD(w), FIELD(codes), FIELD(blocks), FIELD(bits));
LORA_ENGINE_FIELDS(DecodeScaledArgs, FIELD(codes), FIELD(scale), FIELD(zero), FIELD(w), FIELD(rows),
                   FIELD(cols), FIELD(group), FIELD(codes_stride), FIELD(scale_stride),
                   FIELD(zero_stride), FIELD(stride), FIELD(element), FIELD(zero_of_all),
                   FIELD(factor));
LORA_ENGINE_FIELDS(DecodeBlocksArgs, FIELD(codes), FIELD(w), FIELD(rows), FIELD(cols),
                   FIELD(codes_stride), FIELD(stride), FIELD(type));

LORA_ENGINE_FIELDS(MatmulArgs, FIELD(a), FIELD(b), FIELD(addend), FIELD(c), FIELD(m), FIELD(n),
                   FIELD(k), FIELD(a_stride), FIELD(b_stride), FIELD(addend_stride),
                   FIELD(c_stride), FIELD(b_transposed));

static void unpack(py::handle slice, int64_t& begin, int64_t& count) {
  Py_ssize_t start, stop, step;
  if (PySlice_Unpack(slice.ptr(), &start, &stop, &step) < 0) throw py::error_already_set();
  begin = start;
  count = stop - start;
}

static LoraSpan span_of(const py::slice& rows, const py::slice& columns) {
  LoraSpan span;
  unpack(rows, span.row, span.rows);
  unpack(columns, span.column, span.columns);
  return span;
}

// A span is a pair of slices (rows, columns) in Python.
template <>
LoraSpan read_value<LoraSpan>(py::handle object, Elements&) {
  const auto [rows, columns] = object.cast<std::pair<py::slice, py::slice>>();
  return span_of(rows, columns);
}

// A part is a tuple (rows, columns, scale, address of the gradient) in Python.
template <>
LoraPart read_value<LoraPart>(py::handle object, Elements&) {
  const auto [rows, columns, scale, gradient] =
      object.cast<std::tuple<py::slice, py::slice, double, uintptr_t>>();
  return {span_of(rows, columns), scale, reinterpret_cast<void*>(gradient)};
}

namespace {

const Kernels& table() {
  const Kernels* k = kernels();
  if (!k) throw std::runtime_error("this processor runs none of the instruction sets built");
  return *k;
}

template <class Args>
void define(py::module_& m, const char* name, void (*Kernels::*kernel)(DType, const Args&)) {
  m.def(name, [kernel](DType dtype, py::handle object) {
    Elements elements;
    const Args args = read_fields<Args>(object, elements);
    py::gil_scoped_release released;
    advise_heap();
    (table().*kernel)(dtype, args);
  });
}

// Of kernels that take one dtype alone.
template <class Args>
void define(py::module_& m, const char* name, void (*Kernels::*kernel)(const Args&)) {
  m.def(name, [kernel](py::handle object) {
    Elements elements;
    const Args args = read_fields<Args>(object, elements);
    py::gil_scoped_release released;
    advise_heap();
    (table().*kernel)(args);
  });
}

}  // namespace

void bind_cpu(py::module_ m) {
  py::enum_<DType>(m, "DType")
      .value("float32", DType::kFloat32)
      .value("bfloat16", DType::kBFloat16)
      .value("float64", DType::kFloat64);
  py::enum_<Activation>(m, "Activation")
      .value("silu", Activation::kSilu)
      .value("gelu", Activation::kGelu)
      .value("gelu_tanh", Activation::kGeluTanh);

  m.def("isa", [] { return std::string(table().isa); }, "The instruction set in use.");
  m.def("select_isa", &select_isa, py::arg("isa"),
        "Use another of the instruction sets built; False where it cannot run here.");
  m.def(
      "built_isas",
      [] {
        const BuiltIsa* list;
        const int count = built_isas(&list);
        std::vector<std::pair<std::string, bool>> result;
        for (int i = 0; i < count; ++i) result.emplace_back(list[i].table->isa, list[i].runs);
        return result;
      },
      "Pairs (instruction set, whether this processor runs it), best first.");

  define(m, "rms_norm_fwd", &Kernels::rms_norm_fwd);
  define(m, "rms_norm_bwd", &Kernels::rms_norm_bwd);
  define(m, "layer_norm_fwd", &Kernels::layer_norm_fwd);
  define(m, "layer_norm_bwd", &Kernels::layer_norm_bwd);
  define(m, "rope", &Kernels::rope);
  define(m, "glu_fwd", &Kernels::glu_fwd);
  define(m, "glu_bwd", &Kernels::glu_bwd);
  define(m, "cross_entropy", &Kernels::cross_entropy);
  define(m, "attention_fwd", &Kernels::attention_fwd);
  define(m, "attention_bwd", &Kernels::attention_bwd);
  define(m, "attention_decode", &Kernels::attention_decode);
  define(m, "adamw", &Kernels::adamw);
  define(m, "dropout", &Kernels::dropout);
  define(m, "grad_norm", &Kernels::grad_norm);
  define(m, "matmul", &Kernels::matmul);
  define(m, "lora_a_fwd", &Kernels::lora_a_fwd);
  define(m, "lora_b_bwd", &Kernels::lora_b_bwd);
  define(m, "lora_a_bwd", &Kernels::lora_a_bwd);
  define(m, "place_factors", &Kernels::place_factors);
  define(m, "lora_linear_few_rows", &Kernels::lora_linear_few_rows);
  define(m, "quantize_4bit", &Kernels::quantize_4bit);
  define(m, "dequantize_4bit", &Kernels::dequantize_4bit);
  define(m, "quantize_k", &Kernels::quantize_k);
  define(m, "decode_scaled", &Kernels::decode_scaled);
  define(m, "decode_blocks", &Kernels::decode_blocks);
  define(m, "adamw_8bit", &Kernels::adamw_8bit);
}

}  // namespace lora_engine
