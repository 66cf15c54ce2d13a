// The module lora_engine._C: the CPU kernels by address. Callers check shapes, dtypes and layouts
// (lora_engine/ops); here a pointer is an int, as from Tensor.data_ptr(), and 0 is null.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/kernels.hpp"
#include "cpu/memory.hpp"
#include "cpu/openmp_crowd.hpp"
#include "cuda/bindings.hpp"

namespace py = pybind11;
using namespace lora_engine;

namespace {

using Address = uintptr_t;

const void* in(Address address) { return reinterpret_cast<const void*>(address); }
void* out(Address address) { return reinterpret_cast<void*>(address); }

const Kernels& table() {
  const Kernels* k = kernels();
  if (!k) throw std::runtime_error("this processor runs none of the instruction sets built");
  return *k;
}

// Pairs (rows, columns) as Python has them.
using Slices = std::vector<std::pair<py::slice, py::slice>>;

std::vector<LoraSpan> lora_spans(const Slices& slices) {
  std::vector<LoraSpan> spans;
  const auto unpack = [](const py::slice& slice, int64_t& begin, int64_t& count) {
    Py_ssize_t start, stop, step;
    if (PySlice_Unpack(slice.ptr(), &start, &stop, &step) < 0) throw py::error_already_set();
    begin = start;
    count = stop - start;
  };
  for (const auto& [rows, columns] : slices) {
    LoraSpan span;
    unpack(rows, span.row, span.rows);
    unpack(columns, span.column, span.columns);
    spans.push_back(span);
  }
  return spans;
}

AttentionArgs attention_args(Address q, Address k, Address v, Address cos, Address sin,
                             Address cu_seqlens, Address parents, Address o, Address lse,
                             int64_t tokens, int64_t sequences, int64_t q_heads, int64_t kv_heads,
                             int64_t head_dim, int64_t q_stride, int64_t k_stride, int64_t v_stride,
                             int64_t o_stride, int64_t window, double softmax_scale, bool causal) {
  return {in(q),
          in(k),
          in(v),
          in(cos),
          in(sin),
          static_cast<const int32_t*>(in(cu_seqlens)),
          static_cast<const int32_t*>(in(parents)),
          out(o),
          out(lse),
          tokens,
          sequences,
          q_heads,
          kv_heads,
          head_dim,
          q_stride,
          k_stride,
          v_stride,
          o_stride,
          window,
          softmax_scale,
          causal};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ kernels of lora_engine, called through lora_engine.ops";

  py::enum_<DType>(m, "DType")
      .value("float32", DType::kFloat32)
      .value("bfloat16", DType::kBFloat16)
      .value("float64", DType::kFloat64);
  py::enum_<Activation>(m, "Activation")
      .value("silu", Activation::kSilu)
      .value("gelu", Activation::kGelu)
      .value("gelu_tanh", Activation::kGeluTanh);
  py::class_<RopeHeads>(m, "RopeHeads")
      .def(py::init([](Address x, Address y, int64_t heads, int64_t x_stride, int64_t x_head_stride,
                       int64_t y_stride, int64_t y_head_stride) {
        return RopeHeads{in(x), out(y), heads, x_stride, x_head_stride, y_stride, y_head_stride};
      }));

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

  m.def(
      "keep_freed_memory", &keep_freed_memory,
      "Let the allocator keep freed blocks for reuse; False where the C library has no such knob.");

  const auto release = py::call_guard<py::gil_scoped_release>();

  m.def("crowd_openmp", &crowd_openmp, release,
        "Have the threads of GNU's OpenMP runtime, loaded already, wait asleep; False where they "
        "do not.");

  m.def(
      "rms_norm_fwd",
      [](DType dtype, Address x, Address residual, Address weight, Address y, Address h,
         Address rstd, int64_t rows, int64_t heads, int64_t cols, int64_t x_stride,
         int64_t residual_stride, int64_t y_stride, double eps, double offset) {
        table().rms_norm_fwd(
            dtype, {in(x), in(residual), in(weight), out(y), out(h), out(rstd), rows, heads, cols,
                    x_stride, residual_stride, y_stride, eps, offset});
      },
      release);

  m.def(
      "rms_norm_bwd",
      [](DType dtype, Address dy, Address dh, Address h, Address weight, Address rstd, Address dx,
         Address dweight, int64_t rows, int64_t heads, int64_t cols, int64_t dy_stride,
         int64_t dh_stride, int64_t h_stride, int64_t dx_stride, double offset) {
        table().rms_norm_bwd(
            dtype, {in(dy), in(dh), in(h), in(weight), in(rstd), out(dx), out(dweight), rows, heads,
                    cols, dy_stride, dh_stride, h_stride, dx_stride, offset});
      },
      release);

  m.def(
      "layer_norm_fwd",
      [](DType dtype, Address x, Address weight, Address bias, Address y, Address mean,
         Address rstd, int64_t rows, int64_t cols, int64_t x_stride, int64_t y_stride, double eps) {
        table().layer_norm_fwd(dtype, {in(x), in(weight), in(bias), out(y), out(mean), out(rstd),
                                       rows, cols, x_stride, y_stride, eps});
      },
      release);

  m.def(
      "layer_norm_bwd",
      [](DType dtype, Address dy, Address x, Address weight, Address mean, Address rstd, Address dx,
         Address dweight, Address dbias, int64_t rows, int64_t cols, int64_t dy_stride,
         int64_t x_stride, int64_t dx_stride) {
        table().layer_norm_bwd(
            dtype, {in(dy), in(x), in(weight), in(mean), in(rstd), out(dx), out(dweight),
                    out(dbias), rows, cols, dy_stride, x_stride, dx_stride});
      },
      release);

  m.def(
      "rope",
      [](DType dtype, const RopeHeads& q, const RopeHeads& k, DType table_dtype, Address cos,
         Address sin, Address position_ids, int64_t tokens, int64_t head_dim, int64_t rotary_dim,
         int64_t cos_stride, int64_t sin_stride, bool interleaved, bool inverse) {
        table().rope(dtype, {q, k, in(cos), in(sin), static_cast<const int64_t*>(in(position_ids)),
                             table_dtype, tokens, head_dim, rotary_dim, cos_stride, sin_stride,
                             interleaved, inverse});
      },
      release);

  m.def(
      "glu_fwd",
      [](DType dtype, Activation activation, Address gate, Address up, Address y, int64_t rows,
         int64_t cols, int64_t gate_stride, int64_t up_stride, int64_t y_stride) {
        table().glu_fwd(dtype, {in(gate), in(up), out(y), rows, cols, gate_stride, up_stride,
                                y_stride, activation});
      },
      release);

  m.def(
      "glu_bwd",
      [](DType dtype, Activation activation, Address dy, Address gate, Address up, Address dgate,
         Address dup, Address h, int64_t rows, int64_t cols, int64_t dy_stride, int64_t gate_stride,
         int64_t up_stride, int64_t dgate_stride, int64_t dup_stride, int64_t h_stride) {
        table().glu_bwd(
            dtype, {in(dy), in(gate), in(up), out(dgate), out(dup), out(h), rows, cols, dy_stride,
                    gate_stride, up_stride, dgate_stride, dup_stride, h_stride, activation});
      },
      release);

  m.def(
      "cross_entropy",
      [](DType dtype, Address logits, Address target, Address loss, Address logprob,
         Address entropy, Address lse, Address correct, Address grad, Address grad_scale,
         int64_t rows, int64_t cols, int64_t stride, int64_t grad_stride, int64_t ignore_index,
         double label_smoothing, double softcap, double z_loss, bool lse_given) {
        table().cross_entropy(
            dtype, {in(logits), static_cast<const int64_t*>(in(target)), out(loss), out(logprob),
                    out(entropy), out(lse), static_cast<uint8_t*>(out(correct)), out(grad),
                    in(grad_scale), rows, cols, stride, grad_stride, ignore_index, label_smoothing,
                    softcap, z_loss, lse_given});
      },
      release);

  m.def(
      "attention_fwd",
      [](DType dtype, Address q, Address k, Address v, Address cos, Address sin, Address cu_seqlens,
         Address parents, Address o, Address lse, int64_t tokens, int64_t sequences,
         int64_t q_heads, int64_t kv_heads, int64_t head_dim, int64_t q_stride, int64_t k_stride,
         int64_t v_stride, int64_t o_stride, int64_t window, double softmax_scale, bool causal) {
        table().attention_fwd(
            dtype, attention_args(q, k, v, cos, sin, cu_seqlens, parents, o, lse, tokens, sequences,
                                  q_heads, kv_heads, head_dim, q_stride, k_stride, v_stride,
                                  o_stride, window, softmax_scale, causal));
      },
      release);

  m.def(
      "attention_bwd",
      [](DType dtype, Address q, Address k, Address v, Address cos, Address sin, Address cu_seqlens,
         Address parents, Address o, Address lse, int64_t tokens, int64_t sequences,
         int64_t q_heads, int64_t kv_heads, int64_t head_dim, int64_t q_stride, int64_t k_stride,
         int64_t v_stride, int64_t o_stride, int64_t window, double softmax_scale, bool causal,
         Address d_o, Address dq, Address dk, Address dv, int64_t do_stride, int64_t dq_stride,
         int64_t dk_stride, int64_t dv_stride) {
        table().attention_bwd(
            dtype,
            {attention_args(q, k, v, cos, sin, cu_seqlens, parents, o, lse, tokens, sequences,
                            q_heads, kv_heads, head_dim, q_stride, k_stride, v_stride, o_stride,
                            window, softmax_scale, causal),
             in(d_o), out(dq), out(dk), out(dv), do_stride, dq_stride, dk_stride, dv_stride});
      },
      release);

  m.def(
      "adamw",
      [](DType dtype, Address params, Address grads, Address exp_avg, Address exp_avg_sq,
         int64_t count, double lr, double beta1, double beta2, double eps, double weight_decay,
         double bias_correction1, double bias_correction2, double grad_scale, Address grad_norm,
         double max_grad_norm) {
        table().adamw(dtype, {out(params), in(grads), out(exp_avg), out(exp_avg_sq), count, lr,
                              beta1, beta2, eps, weight_decay, bias_correction1, bias_correction2,
                              grad_scale, in(grad_norm), max_grad_norm});
      },
      release);

  m.def(
      "dropout",
      [](DType dtype, Address x, Address y, int64_t rows, int64_t cols, int64_t x_stride,
         int64_t y_stride, double p, uint64_t seed, uint32_t stream) {
        table().dropout(dtype, {in(x), out(y), rows, cols, x_stride, y_stride, p, seed, stream});
      },
      release);

  m.def(
      "adamw_8bit",
      [](Address params, Address grads, Address exp_avg, Address exp_avg_sq, Address exp_avg_absmax,
         Address exp_avg_sq_absmax, int64_t count, double lr, double beta1, double beta2,
         double eps, double weight_decay, double bias_correction1, double bias_correction2,
         double grad_scale, Address grad_norm, double max_grad_norm) {
        table().adamw_8bit({{out(params), in(grads), out(exp_avg), out(exp_avg_sq), count, lr,
                             beta1, beta2, eps, weight_decay, bias_correction1, bias_correction2,
                             grad_scale, in(grad_norm), max_grad_norm},
                            static_cast<float*>(out(exp_avg_absmax)),
                            static_cast<float*>(out(exp_avg_sq_absmax))});
      },
      release);

  m.def(
      "grad_norm",
      [](DType dtype, Address grads, Address norm, int64_t count) {
        table().grad_norm(dtype, {in(grads), out(norm), count});
      },
      release);

  m.def("lora_a_fwd",
        [](DType dtype, Address x, Address lora_a, Address s, int64_t rows, int64_t cols,
           int64_t x_stride, int64_t a_stride, int64_t s_stride, const Slices& slices) {
          const std::vector<LoraSpan> spans = lora_spans(slices);
          py::gil_scoped_release released;
          table().lora_a_fwd(dtype, {in(x), in(lora_a), out(s), rows, cols, x_stride, a_stride,
                                     s_stride, spans.data(), static_cast<int64_t>(spans.size())});
        });

  m.def("lora_b_bwd",
        [](DType dtype, Address dy, Address lora_b, Address s, Address ds, Address d_lora_b,
           int64_t rows, int64_t dy_stride, int64_t b_stride, int64_t s_stride, int64_t ds_stride,
           int64_t d_stride, const Slices& slices) {
          const std::vector<LoraSpan> spans = lora_spans(slices);
          py::gil_scoped_release released;
          table().lora_b_bwd(dtype, {in(dy), in(lora_b), in(s), out(ds), out(d_lora_b), rows,
                                     dy_stride, b_stride, s_stride, ds_stride, d_stride,
                                     spans.data(), static_cast<int64_t>(spans.size())});
        });

  m.def("lora_a_bwd",
        [](DType dtype, Address ds, Address x, Address d_lora_a, int64_t rows, int64_t cols,
           int64_t ds_stride, int64_t x_stride, int64_t d_stride, const Slices& slices) {
          const std::vector<LoraSpan> spans = lora_spans(slices);
          py::gil_scoped_release released;
          table().lora_a_bwd(dtype, {in(ds), in(x), out(d_lora_a), rows, cols, ds_stride, x_stride,
                                     d_stride, spans.data(), static_cast<int64_t>(spans.size())});
        });

  // Linears are (rows, bias, adapters), adapters (lora_a, lora_b, dtype, ranks, strides, scaling).
  m.def(
      "lora_linear_few_rows",
      [](DType dtype, Address x, Address weight, Address residual, Address y, int64_t rows,
         int64_t cols, int64_t x_stride, int64_t w_stride, int64_t residual_stride,
         int64_t y_stride, const std::vector<std::tuple<int64_t, Address, int64_t>>& linears,
         const std::vector<std::tuple<Address, Address, DType, int64_t, int64_t, int64_t, double>>&
             adapters) {
        std::vector<LoraBase> bases;
        for (const auto& [outer, bias, count] : linears) bases.push_back({outer, in(bias), count});
        std::vector<LoraAdapter> added;
        for (const auto& [lora_a, lora_b, type, ranks, a_stride, b_stride, scaling] : adapters)
          added.push_back({in(lora_a), in(lora_b), type, ranks, a_stride, b_stride, scaling});
        py::gil_scoped_release released;
        table().lora_linear_few_rows(
            dtype, {in(x), in(weight), in(residual), out(y), rows, cols, x_stride, w_stride,
                    residual_stride, y_stride, bases.data(), static_cast<int64_t>(bases.size()),
                    added.data(), static_cast<int64_t>(added.size())});
      });

#ifdef LORA_ENGINE_CUDA_ARCHITECTURES
  cuda::bind(m.def_submodule("cuda", "CUDA kernels, called through lora_engine.backends.cuda"));
#endif
  m.def(
      "cuda_architectures",
      [] {
        std::vector<std::string> list;
#ifdef LORA_ENGINE_CUDA_ARCHITECTURES
        std::istringstream names(LORA_ENGINE_CUDA_ARCHITECTURES);
        for (std::string name; names >> name;) list.push_back(name);
#endif
        return list;
      },
      "What the CUDA kernels were compiled for, as \"90a\"; empty where they were left out.");
}
