// Gradients of the keys and values of sequences that others continue. Every task that attends to
// such keys keeps its part of their gradients here, and the parts are added in the order of the
// sequences, so that the result does not depend on the threads. This costs two rows of float32 for
// every token of a prefix and every task that attends to it.
#pragma once

#include "attention.hpp"

namespace lora_engine {
namespace {

template <class T>
class SharedGradients {
 public:
  using A = acc_t<T>;

  explicit SharedGradients(const AttentionArgs& a) : a_(a) {
    if (!a.parents) return;
    rows_ = scratch_.allocate<int64_t>(a.sequences);
    first_ = scratch_.allocate<int64_t>(a.sequences);
    for (int64_t s = 0; s < a.sequences; ++s) rows_[s] = 0;
    for (int64_t s = 0; s < a.sequences; ++s)
      if (a.parents[s] >= 0) rows_[a.parents[s]] = 1;
    int64_t total = 0;
    for (int64_t s = 0; s < a.sequences; ++s) {
      const int64_t own = a.cu_seqlens[s + 1] - a.cu_seqlens[s];
      rows_[s] = prefix_length(a, s) + (rows_[s] ? own : 0);
      first_[s] = total;
      total += rows_[s];
    }
    dk_ = scratch_.allocate<A>(total * a.kv_heads * a.head_dim);
    dv_ = scratch_.allocate<A>(total * a.kv_heads * a.head_dim);
  }

  // How many of a task's keys, from the first on, are shared with other tasks.
  int64_t rows(const HeadTask& task) const { return a_.parents ? rows_[task.sequence] : 0; }

  // Copies a task's part of the shared rows of dk and dv, which are `ld` values apart.
  void keep(const HeadTask& task, const A* dk, const A* dv, int64_t ld) {
    for (int64_t i = 0; i < rows(task); ++i) {
      std::memcpy(row(dk_, task, i), dk + i * ld, sizeof(A) * a_.head_dim);
      std::memcpy(row(dv_, task, i), dv + i * ld, sizeof(A) * a_.head_dim);
    }
  }

  // Whether other sequences continue the task's: then its own keys are shared as well.
  bool continued(const HeadTask& task) const { return rows(task) == task.length; }

  // Adds to a continued sequence's part those of all that continue it; returns its own rows of
  // dk and dv, `head_dim` values apart.
  void sum(const HeadTask& task, A** dk, A** dv) {
    const int64_t count = (task.length - task.prefix) * a_.head_dim;
    *dk = row(dk_, task, task.prefix);
    *dv = row(dv_, task, task.prefix);
    for (int64_t s = task.sequence + 1; s < a_.sequences; ++s) {
      if (!continues(s, task.sequence)) continue;
      const HeadTask other{s, task.kv_head, 0, 0, 0};
      const A* other_dk = row(dk_, other, task.prefix);
      const A* other_dv = row(dv_, other, task.prefix);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        (*dk)[i] += other_dk[i];
        (*dv)[i] += other_dv[i];
      }
    }
  }

 private:
  // The heads of a sequence are adjacent.
  A* row(A* base, const HeadTask& task, int64_t i) const {
    const int64_t head = first_[task.sequence] * a_.kv_heads + rows_[task.sequence] * task.kv_head;
    return base + (head + i) * a_.head_dim;
  }

  bool continues(int64_t sequence, int64_t ancestor) const {
    while (sequence > ancestor) sequence = a_.parents[sequence];
    return sequence == ancestor;
  }

  const AttentionArgs& a_;
  Scratch scratch_;
  int64_t *rows_ = nullptr, *first_ = nullptr;  // [sequences]: shared rows, and where they start
  A *dk_ = nullptr, *dv_ = nullptr;
};

}  // namespace
}  // namespace lora_engine
