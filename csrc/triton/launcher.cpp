// Launches Triton kernels that are compiled already, from the arguments as Python passes them.
//
// What Triton compiles for depends on little: the device, dtype and alignment of tensors, whether
// an integer is 1, a multiple of 16 or wide, and the constants. A Launcher writes that down as a
// key of machine words while it reads the arguments, finds the kernel that was compiled for it,
// packs the same arguments as the kernel's parameters and calls the driver. Whatever it has no
// kernel for, or does not know, goes to a Python callable, which launches by Triton.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "bindings.hpp"

namespace lora_engine {
namespace triton {
namespace {

namespace py = pybind11;

// cuLaunchKernel: function, grid, block, bytes of shared memory, stream, parameters, extra.
using Launch = int (*)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                       void*, void**, void**);

constexpr uintptr_t kDivisor = 16;  // of addresses and integers that Triton specialises on
constexpr size_t kMostArguments = 64;

// A word of a key: what kind of argument stands here, and what is known of it.
enum class Tag : uint64_t { kTensor, kNone, kInteger, kFloat, kConstantInteger, kConstantObject };

constexpr uint64_t word(Tag tag, uint64_t known = 0) {
  return static_cast<uint64_t>(tag) << 8 | known;
}

// How a kernel takes an argument. Constants and what was compiled in are not passed.
enum class Kind : uint8_t { kPointer, kInt32, kInt64, kFloat32 };

struct Parameter {
  size_t argument;
  Kind kind;
};

// What a call is keyed by. `objects` are compared by Python; the rest by its words.
struct Key {
  std::vector<uint64_t> words;
  std::vector<PyObject*> objects;  // borrowed

  void clear() {
    words.clear();
    objects.clear();
  }

  uint64_t hash() const {
    uint64_t h = 0xcbf29ce484222325u;
    for (uint64_t word : words) {
      h = (h ^ word) * 0x100000001b3u;
      h ^= h >> 29;
    }
    return h;
  }
};

struct Compiled {
  std::vector<uint64_t> words;
  std::vector<py::object> objects;
  py::object owner;  // keeps the function loaded
  void* function;
  unsigned threads, shared;
  std::vector<Parameter> parameters;
  size_t scratches;  // trailing pointers to scratch memory, of which the first may be used
  uint64_t scratch_bytes, scratch_alignment;  // of each block
};

// What is common to all launchers of a process.
struct Driver {
  Launch launch;
  py::object current_device;        // () -> int
  py::object current_stream;        // (device) -> int
  py::object allocate;              // (bytes, alignment, stream) -> tensor
  py::object hooks;                 // has launch_enter_hook and launch_exit_hook
  std::vector<py::object> tensors;  // the types that are taken as tensors
  // Of the tensors' base type; called or read without a look-up by name.
  py::object data_ptr, dtype, on_device;
};

struct Names {
  PyObject* enter = PyUnicode_InternFromString("launch_enter_hook");
  PyObject* exit = PyUnicode_InternFromString("launch_exit_hook");
  PyObject* calls = PyUnicode_InternFromString("calls");
};

// Throws the Python error that is set.
[[noreturn]] void raise() { throw py::error_already_set(); }

py::object owned(PyObject* made) {
  if (made == nullptr) raise();
  return py::reinterpret_steal<py::object>(made);
}

py::object read(const py::object& descriptor, PyObject* object) {
  descrgetfunc get = Py_TYPE(descriptor.ptr())->tp_descr_get;
  return owned(get(descriptor.ptr(), object, reinterpret_cast<PyObject*>(Py_TYPE(object))));
}

uint64_t address_of(const py::object& method, PyObject* tensor) {
  const py::object address = owned(PyObject_Vectorcall(method.ptr(), &tensor, 1, nullptr));
  const uint64_t value = PyLong_AsUnsignedLongLong(address.ptr());
  if (PyErr_Occurred()) raise();
  return value;
}

// Whether nobody asked Triton to be told of launches.
bool is_unobserved(PyObject* hooks, PyObject* name) {
  static const Names names;
  const py::object hook = owned(PyObject_GetAttr(hooks, name));
  if (hook.is_none()) return true;
  PyObject* calls = PyObject_GetAttr(hook.ptr(), names.calls);
  if (calls == nullptr) {
    PyErr_Clear();
    return false;  // one callable, not a chain of them
  }
  const py::object list = owned(calls);
  return PyList_CheckExact(list.ptr()) && PyList_GET_SIZE(list.ptr()) == 0;
}

bool are_equal(PyObject* a, PyObject* b) {
  if (a == b) return true;
  if (Py_TYPE(a) != Py_TYPE(b)) return false;
  const int equal = PyObject_RichCompareBool(a, b, Py_EQ);
  if (equal < 0) raise();
  return equal == 1;
}

class Launcher {
 public:
  // other: launches by Triton what there is no kernel for: (grid, *arguments, **constants).
  // constants: the positions of arguments that are constants of the kernel.
  Launcher(py::object other, const std::vector<size_t>& constants) : other_(std::move(other)) {
    for (size_t i : constants) {
      if (i >= constant_.size()) constant_.resize(i + 1, false);
      constant_[i] = true;
    }
  }

  // Launches, or has it launched. arguments: the grid, the kernel's, and values of `names`.
  PyObject* call(PyObject* const* arguments, size_t positional, PyObject* names) {
    if (driver_ && positional > 0 && launched(arguments, positional, names)) Py_RETURN_NONE;
    return PyObject_Vectorcall(other_.ptr(), arguments, positional, names);
  }

  // Keeps a kernel for calls such as this one; false where a parameter is not understood.
  bool keep(std::shared_ptr<Driver> driver, const py::tuple& arguments, const py::dict& constants,
            const py::object& owner, uintptr_t function, unsigned threads, unsigned shared,
            const std::vector<std::string>& kinds, size_t scratches, uint64_t scratch_bytes,
            uint64_t scratch_alignment) {
    driver_ = std::move(driver);
    std::vector<PyObject*> given;
    for (py::handle x : arguments) given.push_back(x.ptr());
    py::list names;
    for (auto item : constants) {
      names.append(item.first);
      given.push_back(item.second.ptr());
    }
    const py::tuple called(names);
    uint64_t values[kMostArguments];
    Key key;
    if (kinds.size() != arguments.size() || (scratch_bytes > 0 && scratches == 0) ||
        !read_arguments(given.data(), arguments.size(), called.ptr(), key, values)) {
      return false;
    }
    if (find(key) != nullptr) return true;
    Compiled made{key.words,
                  {},
                  owner,
                  reinterpret_cast<void*>(function),
                  threads,
                  shared,
                  {},
                  scratches,
                  scratch_bytes,
                  scratch_alignment};
    for (PyObject* object : key.objects) {
      made.objects.push_back(py::reinterpret_borrow<py::object>(object));
    }
    for (size_t i = 0; i < kinds.size(); ++i) {
      PyObject* x = given[i];
      if (kinds[i] == "constexpr") continue;
      if (is_constant(i)) return false;
      if (kinds[i] == "pointer" && (is_tensor(x) || x == Py_None)) {
        made.parameters.push_back({i, Kind::kPointer});
      } else if (kinds[i] == "i32" && PyLong_CheckExact(x)) {
        made.parameters.push_back({i, Kind::kInt32});
      } else if (kinds[i] == "i64" && PyLong_CheckExact(x)) {
        made.parameters.push_back({i, Kind::kInt64});
      } else if (kinds[i] == "fp32" && PyFloat_CheckExact(x)) {
        made.parameters.push_back({i, Kind::kFloat32});
      } else {
        return false;
      }
    }
    kept_.emplace(key.hash(), std::move(made));
    return true;
  }

  size_t size() const { return kept_.size(); }

 private:
  bool is_constant(size_t i) const { return i < constant_.size() && constant_[i]; }

  bool is_tensor(PyObject* x) const {
    for (const py::object& type : driver_->tensors) {
      if (reinterpret_cast<PyObject*>(Py_TYPE(x)) == type.ptr()) return true;
    }
    return false;
  }

  // Writes the key, and the values that arguments by position have as parameters. False for an
  // argument that is not understood.
  bool read_arguments(PyObject* const* arguments, size_t positional, PyObject* names, Key& key,
                      uint64_t* values) const {
    if (positional > kMostArguments) return false;
    const py::object device = owned(PyObject_CallNoArgs(driver_->current_device.ptr()));
    key.words.push_back(PyLong_AsUnsignedLongLong(device.ptr()));
    key.words.push_back(positional);
    for (size_t i = 0; i < positional; ++i) {
      if (is_constant(i)) {
        write_constant(arguments[i], key);
      } else if (!write_argument(arguments[i], key, values[i])) {
        return false;
      }
    }
    const size_t count = names == nullptr ? 0 : PyTuple_GET_SIZE(names);
    for (size_t i = 0; i < count; ++i) {
      // Interned, the same name is the same object, which others hold too.
      PyObject* name = PyTuple_GET_ITEM(names, i);
      Py_INCREF(name);
      PyUnicode_InternInPlace(&name);
      key.words.push_back(reinterpret_cast<uintptr_t>(name));
      key.objects.push_back(name);
      Py_DECREF(name);
      write_constant(arguments[positional + i], key);
    }
    return true;
  }

  bool write_argument(PyObject* x, Key& key, uint64_t& value) const {
    if (x == Py_None) {
      key.words.push_back(word(Tag::kNone));
      value = 0;
    } else if (is_tensor(x)) {
      if (read(driver_->on_device, x).ptr() != Py_True) return false;
      value = address_of(driver_->data_ptr, x);
      key.words.push_back(word(Tag::kTensor, value % kDivisor == 0));
      // Dtypes are objects of which there is one each, for good.
      key.words.push_back(reinterpret_cast<uintptr_t>(read(driver_->dtype, x).ptr()));
    } else if (PyLong_CheckExact(x)) {
      int overflow = 0;
      const int64_t number = PyLong_AsLongLongAndOverflow(x, &overflow);
      if (overflow != 0) return false;
      const bool is_wide = number < INT32_MIN || number > INT32_MAX;
      const uint64_t known = (number == 1) << 2 | (number % int64_t{kDivisor} == 0) << 1 | is_wide;
      key.words.push_back(word(Tag::kInteger, known));
      value = static_cast<uint64_t>(number);
    } else if (PyFloat_CheckExact(x)) {
      key.words.push_back(word(Tag::kFloat));
      const float number = static_cast<float>(PyFloat_AS_DOUBLE(x));
      value = 0;
      std::memcpy(&value, &number, sizeof number);
    } else {
      return false;
    }
    return true;
  }

  static void write_constant(PyObject* x, Key& key) {
    int overflow = 1;
    if (PyLong_CheckExact(x)) {
      const int64_t number = PyLong_AsLongLongAndOverflow(x, &overflow);
      if (overflow == 0) {
        key.words.push_back(word(Tag::kConstantInteger));
        key.words.push_back(static_cast<uint64_t>(number));
        return;
      }
    }
    key.words.push_back(word(Tag::kConstantObject));
    key.objects.push_back(x);
  }

  const Compiled* find(const Key& key) const {
    const auto [first, last] = kept_.equal_range(key.hash());
    for (auto found = first; found != last; ++found) {
      const Compiled& compiled = found->second;
      if (compiled.words != key.words || compiled.objects.size() != key.objects.size()) continue;
      size_t same = 0;
      while (same < key.objects.size() &&
             are_equal(compiled.objects[same].ptr(), key.objects[same])) {
        ++same;
      }
      if (same == key.objects.size()) return &compiled;
    }
    return nullptr;
  }

  bool launched(PyObject* const* arguments, size_t positional, PyObject* names) {
    static const Names attributes;
    static thread_local Key key;
    uint64_t values[kMostArguments];
    unsigned grid[3] = {1, 1, 1};
    key.clear();
    if (!read_grid(arguments[0], grid) ||
        !read_arguments(arguments + 1, positional - 1, names, key, values) ||
        !is_unobserved(driver_->hooks.ptr(), attributes.enter) ||
        !is_unobserved(driver_->hooks.ptr(), attributes.exit)) {
      return false;
    }
    const Compiled* compiled = find(key);
    if (compiled == nullptr) return false;
    if (grid[0] == 0 || grid[1] == 0 || grid[2] == 0) return true;
    const py::object device = owned(PyLong_FromUnsignedLongLong(key.words[0]));
    PyObject* device_given = device.ptr();
    const py::object stream =
        owned(PyObject_Vectorcall(driver_->current_stream.ptr(), &device_given, 1, nullptr));
    void* stream_handle = PyLong_AsVoidPtr(stream.ptr());
    if (PyErr_Occurred()) raise();
    void* parameters[kMostArguments + 2];
    size_t count = 0;
    for (const Parameter& parameter : compiled->parameters) {
      parameters[count++] = &values[parameter.argument];  // little-endian: the low bytes first
    }
    uint64_t scratch = 0, none = 0;
    for (size_t i = 0; i < compiled->scratches; ++i) {
      parameters[count++] = i == 0 ? &scratch : &none;
    }
    py::object held;  // until the launch is queued: what is freed later is reused after it
    if (compiled->scratch_bytes > 0) {
      const uint64_t blocks = uint64_t{grid[0]} * grid[1] * grid[2];
      const py::int_ bytes(blocks * compiled->scratch_bytes);
      const py::int_ alignment(compiled->scratch_alignment);
      PyObject* asked[] = {bytes.ptr(), alignment.ptr(), stream.ptr()};
      held = owned(PyObject_Vectorcall(driver_->allocate.ptr(), asked, 3, nullptr));
      scratch = address_of(driver_->data_ptr, held.ptr());
    }
    int error = 0;
    {
      py::gil_scoped_release released;
      error = driver_->launch(compiled->function, grid[0], grid[1], grid[2], compiled->threads, 1,
                              1, compiled->shared, stream_handle, parameters, nullptr);
    }
    return error == 0;  // else Triton makes the thread's context, or tells the error
  }

  static bool read_grid(PyObject* given, unsigned* grid) {
    if (!PyTuple_CheckExact(given) || PyTuple_GET_SIZE(given) > 3) return false;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(given); ++i) {
      PyObject* extent = PyTuple_GET_ITEM(given, i);
      if (!PyLong_CheckExact(extent)) return false;
      int overflow = 0;
      const long number = PyLong_AsLongAndOverflow(extent, &overflow);
      if (overflow != 0 || number < 0 || number > INT32_MAX) return false;
      grid[i] = static_cast<unsigned>(number);
    }
    return true;
  }

  py::object other_;
  std::vector<bool> constant_;
  std::shared_ptr<Driver> driver_;
  std::unordered_multimap<uint64_t, Compiled> kept_;
};

using Shared = std::shared_ptr<Launcher>;
constexpr const char* kCapsule = "lora_engine.Launcher";

PyObject* call(PyObject* capsule, PyObject* const* arguments, Py_ssize_t positional,
               PyObject* names) {
  auto* launcher = static_cast<Shared*>(PyCapsule_GetPointer(capsule, kCapsule));
  if (launcher == nullptr) return nullptr;
  try {
    return (*launcher)->call(arguments, static_cast<size_t>(positional), names);
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// The launcher as a callable that takes arguments as they lie on Python's stack.
py::object entry(Shared launcher) {
  static PyMethodDef method = {
      "launch", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call)),
      METH_FASTCALL | METH_KEYWORDS, "launch(grid, *arguments, **constants)"};
  const py::object capsule =
      owned(PyCapsule_New(new Shared(std::move(launcher)), kCapsule, [](PyObject* dying) {
        delete static_cast<Shared*>(PyCapsule_GetPointer(dying, kCapsule));
      }));
  return owned(PyCFunction_NewEx(&method, capsule.ptr(), nullptr));
}

}  // namespace

void bind(py::module_ m) {
  py::class_<Driver, std::shared_ptr<Driver>>(m, "Driver")
      .def(py::init([](uintptr_t launch, py::object current_device, py::object current_stream,
                       py::object allocate, py::object hooks, std::vector<py::object> tensors,
                       py::object data_ptr, py::object dtype, py::object on_device) {
             for (const py::object& attribute : {dtype, on_device}) {
               if (Py_TYPE(attribute.ptr())->tp_descr_get == nullptr) {
                 throw py::type_error("dtype and on_device are attributes of a type");
               }
             }
             return std::make_shared<Driver>(Driver{
                 reinterpret_cast<Launch>(launch), std::move(current_device),
                 std::move(current_stream), std::move(allocate), std::move(hooks),
                 std::move(tensors), std::move(data_ptr), std::move(dtype), std::move(on_device)});
           }),
           py::kw_only(), py::arg("launch"), py::arg("current_device"), py::arg("current_stream"),
           py::arg("allocate"), py::arg("hooks"), py::arg("tensors"), py::arg("data_ptr"),
           py::arg("dtype"), py::arg("on_device"));
  py::class_<Launcher, Shared>(m, "Launcher")
      .def(py::init<py::object, const std::vector<size_t>&>(), py::arg("other"),
           py::arg("constants"))
      .def("entry", &entry)
      .def("keep", &Launcher::keep, py::kw_only(), py::arg("driver"), py::arg("arguments"),
           py::arg("constants"), py::arg("owner"), py::arg("function"), py::arg("threads"),
           py::arg("shared"), py::arg("kinds"), py::arg("scratches"), py::arg("scratch_bytes"),
           py::arg("scratch_alignment"))
      .def("__len__", &Launcher::size);
}

}  // namespace triton
}  // namespace lora_engine
