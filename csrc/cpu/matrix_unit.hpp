#pragma once

namespace lora_engine {

// Whether the processor has AMX's tiles and their bfloat16 product and this process may use them,
// which is asked of the operating system once: their registers are large, and Linux saves them for
// processes alone that asked.
bool matrix_unit_permitted();

}  // namespace lora_engine
