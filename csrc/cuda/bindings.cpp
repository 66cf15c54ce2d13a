// The launchers of csrc/cuda for Python: addresses are ints, 0 is null, and so is the stream.
#include "bindings.hpp"

#include "launchers.hpp"

namespace py = pybind11;

namespace lora_engine {
namespace cuda {
namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

void bind(py::module_ m) {
  const auto release = py::call_guard<py::gil_scoped_release>();

  m.def(
      "adamw",
      [](Address params, Address grads, Address exp_avg, Address exp_avg_sq, int64_t count,
         double lr, double beta1, double beta2, double eps, double weight_decay,
         double bias_correction1, double bias_correction2, double grad_scale, Address grad_norm,
         double max_grad_norm, Address stream) {
        adamw({at<float>(params),
               at<const float>(grads),
               at<float>(exp_avg),
               at<float>(exp_avg_sq),
               count,
               {lr, beta1, beta2, eps, weight_decay, bias_correction1, bias_correction2, grad_scale,
                at<const float>(grad_norm), max_grad_norm}},
              at<void>(stream));
      },
      release);

  m.def(
      "adamw_8bit",
      [](Address params, Address grads, Address exp_avg, Address exp_avg_sq, Address exp_avg_absmax,
         Address exp_avg_sq_absmax, int64_t count, double lr, double beta1, double beta2,
         double eps, double weight_decay, double bias_correction1, double bias_correction2,
         double grad_scale, Address grad_norm, double max_grad_norm, Address stream) {
        adamw_8bit({at<float>(params),
                    at<const float>(grads),
                    at<uint8_t>(exp_avg),
                    at<uint8_t>(exp_avg_sq),
                    at<float>(exp_avg_absmax),
                    at<float>(exp_avg_sq_absmax),
                    count,
                    {lr, beta1, beta2, eps, weight_decay, bias_correction1, bias_correction2,
                     grad_scale, at<const float>(grad_norm), max_grad_norm}},
                   at<void>(stream));
      },
      release);

  m.def(
      "grad_norm",
      [](Address grads, Address partials, Address norm, int64_t count, Address stream) {
        grad_norm({at<const float>(grads), at<float>(partials), at<float>(norm), count},
                  at<void>(stream));
      },
      release);
}

}  // namespace cuda
}  // namespace lora_engine
