// State spaces and how an access finds its bytes.
#pragma once

#include "decode.hpp"

namespace ptx {

enum class Space { kGeneric, kGlobal, kShared, kLocal, kParam };

// The space that an opcode names; kGeneric if none.
Space space_of(const Op& op);

// The bytes of a lane's access, checked for bounds and alignment.
uint8_t* locate(Warp& warp, int lane, Space space, uint64_t address, uint32_t bytes);

// Tells the asynchronous proxy's view of a write to shared memory, if it was one.
void note_write(Warp& warp, Space space, uint64_t address, uint32_t bytes);

// The address in shared memory that a shared or generic address stands for.
uint32_t shared_address(uint64_t address);

}  // namespace ptx
