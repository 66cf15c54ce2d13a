// The kernels that use a matrix unit's tiles, with the model of simd/tiles.hpp for bfloat16, as a
// Python module. The others of its table are null.
#include <pybind11/pybind11.h>

#include <cstring>

#include "bindings.hpp"
#include "kernels.hpp"

namespace lora_engine {

namespace tile_model {
void attention_fwd(DType, const AttentionArgs&);
void attention_bwd(DType, const AttentionBwdArgs&);
void matmul(DType, const MatmulArgs&);
void lora_a_fwd(DType, const LoraAFwdArgs&);
void lora_b_bwd(DType, const LoraBBwdArgs&);
void lora_a_bwd(DType, const LoraABwdArgs&);
void lora_linear_few_rows(DType, const FewRowsArgs&);
}  // namespace tile_model

const Kernels* kernels() {
  static const Kernels table = [] {
    Kernels made{};
    made.isa = "tile_model";
    made.attention_fwd = tile_model::attention_fwd;
    made.attention_bwd = tile_model::attention_bwd;
    made.matmul = tile_model::matmul;
    made.lora_a_fwd = tile_model::lora_a_fwd;
    made.lora_b_bwd = tile_model::lora_b_bwd;
    made.lora_a_bwd = tile_model::lora_a_bwd;
    made.lora_linear_few_rows = tile_model::lora_linear_few_rows;
    return made;
  }();
  return &table;
}

int built_isas(const BuiltIsa** list) {
  static const BuiltIsa only{kernels(), true};
  *list = &only;
  return 1;
}

bool select_isa(const char* isa) { return std::strcmp(isa, kernels()->isa) == 0; }

}  // namespace lora_engine

PYBIND11_MODULE(tile_model, module) { lora_engine::bind_cpu(module); }
