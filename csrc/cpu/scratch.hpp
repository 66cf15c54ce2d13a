// Work space of a kernel: cache-line aligned, freed when it goes out of scope.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace lora_engine {
namespace {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    while (head_) {
      Header* next = head_->next;
      std::free(head_);
      head_ = next;
    }
  }

  // `count` elements of T, uninitialised. These kernels run without exceptions inside parallel
  // regions, so running out of memory ends the process with a message.
  template <class T>
  T* allocate(int64_t count) {
    const size_t bytes = (sizeof(Header) + sizeof(T) * static_cast<size_t>(count) + 63) / 64 * 64;
    Header* header = static_cast<Header*>(std::aligned_alloc(64, bytes));
    if (!header) {
      std::fprintf(stderr, "lora_engine: out of memory for %zu bytes of work space\n", bytes);
      std::abort();
    }
    header->next = head_;
    head_ = header;
    return reinterpret_cast<T*>(header + 1);
  }

 private:
  struct alignas(64) Header {
    Header* next;
  };
  Header* head_ = nullptr;
};

}  // namespace
}  // namespace lora_engine
