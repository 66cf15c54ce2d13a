// Reads a kernel's struct of arguments from a Python NamedTuple that has the same field names.
//
// `Fields<Args>::list()` names the members of Args. A tuple's class is compared with it, names and
// order, when the class is first seen; from then on the tuple is read by position.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace lora_engine {

namespace py = pybind11;

// Specialised for each struct: its name, and `list()`, a tuple of Field and Array.
template <class Args>
struct Fields;

template <class Args, class Member>
struct Field {
  const char* name;
  Member Args::* member;
  static constexpr size_t members = 1;
};

// A Python sequence that the struct has as a pointer and a count.
template <class Args, class Element>
struct Array {
  const char* name;
  const Element* Args::* data;
  int64_t Args::* count;
  static constexpr size_t members = 2;
};

template <class Args, class Member>
constexpr Field<Args, Member> field(const char* name, Member Args::* member) {
  return {name, member};
}

template <class Args, class Element>
constexpr Array<Args, Element> array(const char* name, const Element* Args::* data,
                                     int64_t Args::* count) {
  return {name, data, count};
}

// LORA_ENGINE_FIELDS(AnArgs, FIELD(x), FIELD(rows)): FIELD names a member by itself.
#define LORA_ENGINE_FIELDS(STRUCT, ...)                                   \
  template <>                                                             \
  struct Fields<STRUCT> {                                                 \
    using Args = STRUCT;                                                  \
    static constexpr const char* name = #STRUCT;                          \
    static constexpr auto list() { return std::make_tuple(__VA_ARGS__); } \
  }
#define FIELD(member) field(#member, &Args::member)

// Owns the elements of arrays while a kernel reads them.
using Elements = std::vector<std::shared_ptr<void>>;

namespace reading {

struct Anything {
  template <class T>
  operator T() const;
};

template <class Args, class Indices, class = void>
struct HasMembers : std::false_type {};
template <class Args, size_t... I>
struct HasMembers<Args, std::index_sequence<I...>,
                  std::void_t<decltype(Args{(void(I), Anything{})...})>> : std::true_type {};

// Whether the struct has exactly `count` members: no member is missing from its list.
template <class Args, size_t count>
constexpr bool has_exactly = HasMembers<Args, std::make_index_sequence<count>>::value &&
                             !HasMembers<Args, std::make_index_sequence<count + 1>>::value;

template <class T, class = void>
struct IsListed : std::false_type {};
template <class T>
struct IsListed<T, std::void_t<decltype(Fields<T>::list())>> : std::true_type {};

template <class Args>
constexpr size_t list_size = std::tuple_size_v<decltype(Fields<Args>::list())>;

template <class Args>
py::tuple names() {
  return std::apply([](const auto&... field) { return py::make_tuple(field.name...); },
                    Fields<Args>::list());
}

// TypeError unless `object` is of a class with the names of Args' list, in its order.
template <class Args>
void check_class(py::handle object) {
  static py::handle known;  // a class that fits, kept alive
  const py::handle type = py::type::handle_of(object);
  if (!type.is(known)) {
    const py::object fields = py::getattr(type, "_fields", py::none());
    if (!PyTuple_Check(object.ptr()) || !fields.equal(names<Args>()))
      throw py::type_error(std::string(Fields<Args>::name) + ": expected the fields " +
                           std::string(py::repr(names<Args>())) + ", got " +
                           std::string(py::repr(fields)) + " of " + std::string(py::repr(type)) +
                           "; if lora_engine is of other sources than its extension, build that "
                           "again: pip install -e .");
    type.inc_ref();
    known = type;
  }
  if (static_cast<size_t>(PyTuple_GET_SIZE(object.ptr())) != list_size<Args>)
    throw py::type_error(std::string(Fields<Args>::name) + ": too few or too many values");
}

inline void raise_python_error() {
  if (PyErr_Occurred()) throw py::error_already_set();
}

}  // namespace reading

template <class Args>
Args read_fields(py::handle object, Elements& elements);

// One value; an address is an int, as from Tensor.data_ptr(), and 0 is null.
template <class T>
T read_value(py::handle object, Elements& elements) {
  if constexpr (std::is_pointer_v<T>) {
    const unsigned long long address = PyLong_AsUnsignedLongLong(object.ptr());
    if (address == ~0ull) reading::raise_python_error();
    return reinterpret_cast<T>(static_cast<uintptr_t>(address));
  } else if constexpr (std::is_same_v<T, bool>) {
    if (!PyBool_Check(object.ptr())) throw py::type_error("expected True or False");
    return object.ptr() == Py_True;
  } else if constexpr (std::is_same_v<T, int64_t>) {
    const long long value = PyLong_AsLongLong(object.ptr());
    if (value == -1) reading::raise_python_error();
    return value;
  } else if constexpr (std::is_same_v<T, double>) {
    const double value = PyFloat_AsDouble(object.ptr());
    if (value == -1.0) reading::raise_python_error();
    return value;
  } else if constexpr (reading::IsListed<T>::value) {
    return read_fields<T>(object, elements);
  } else {
    return object.cast<T>();
  }
}

template <class Args, class Member>
void read_into(Args& args, const Field<Args, Member>& field, py::handle object,
               Elements& elements) {
  args.*field.member = read_value<Member>(object, elements);
}

template <class Args, class Element>
void read_into(Args& args, const Array<Args, Element>& array, py::handle object,
               Elements& elements) {
  const auto values = std::make_shared<std::vector<Element>>();
  for (const py::handle element : object) values->push_back(read_value<Element>(element, elements));
  args.*array.data = values->data();
  args.*array.count = static_cast<int64_t>(values->size());
  elements.push_back(values);
}

// The struct that `object` has the fields of; its arrays live as long as `elements`.
template <class Args>
Args read_fields(py::handle object, Elements& elements) {
  return std::apply(
      [&](const auto&... field) {
        static_assert(reading::has_exactly<Args, (0 + ... + field.members)>,
                      "a member of the struct is missing from its list");
        reading::check_class<Args>(object);
        Args args{};
        Py_ssize_t position = 0;
        const auto read = [&](const auto& each) {
          try {
            read_into(args, each, PyTuple_GET_ITEM(object.ptr(), position++), elements);
          } catch (const std::exception& error) {
            throw py::type_error(std::string(Fields<Args>::name) + "." + each.name + ": " +
                                 error.what());
          }
        };
        (read(field), ...);
        return args;
      },
      Fields<Args>::list());
}

}  // namespace lora_engine
