// The only file that knows Python: the module myconv._C with the fast entries conv1d .. conv_transpose3d and
// introspection.
//
// A fast entry reads the arguments of a plain call (exact tensors, ints and tuples or lists of ints, no torch-function
// mode), checks it and calls the operator through the dispatcher, with no Python frame and no argument parser in
// between. Any other call goes, with its arguments untouched, to the Python function of the same name in
// myconv/functional.py.
#include <ATen/PythonTorchFunctionTLS.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <string>
#include <vector>

#include "checks.h"
#include "cpu/isa.h"
#include "cpu/kept_memory.h"
#include "cpu/parallel.h"
#include "cpu/tables.h"
#include "cuda/tables.h"
#include "operators.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace myconv {
namespace {

// The arguments of all functions; the two orders say which position is which.
enum Slot { kInput, kWeight, kBias, kStride, kPadding, kDilation, kGroups, kOutputPadding, kPaddingMode, kSlots };

constexpr std::array<Slot, 8> kConvOrder = {kInput, kWeight, kBias, kStride, kPadding, kDilation, kGroups, kSlots};
constexpr std::array<Slot, 8> kTransposeOrder = {kInput,   kWeight,        kBias,   kStride,
                                                 kPadding, kOutputPadding, kGroups, kDilation};
constexpr std::array<const char*, kSlots> kNames = {"input",    "weight", "bias",           "stride",      "padding",
                                                    "dilation", "groups", "output_padding", "padding_mode"};
constexpr std::array<const char*, 4> kModes = {"zeros", "reflect", "replicate", "circular"};  // in PaddingMode's order
constexpr const char* kFunctions[2][3] = {{"conv1d", "conv2d", "conv3d"},
                                          {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}};

PyObject* general[2][3];  // the functions of functional.py, set by it

using Ints = c10::SmallVector<int64_t, 3>;

// One int for all axes, or a tuple or list with one int each. False: not a plain value.
bool read_ints(PyObject* value, int rank, int64_t standard, Ints& ints) {
  const auto read = [&](PyObject* item) {
    if (!PyLong_CheckExact(item)) return false;
    int overflow = 0;
    ints.push_back(PyLong_AsLongLongAndOverflow(item, &overflow));
    return overflow == 0;
  };
  if (!value) {
    ints.assign(rank, standard);
    return true;
  }
  if (PyTuple_CheckExact(value) || PyList_CheckExact(value)) {
    const Py_ssize_t n = PySequence_Fast_GET_SIZE(value);
    if (n != 1 && n != rank) return false;
    for (Py_ssize_t i = 0; i < n; ++i)
      if (!read(PySequence_Fast_GET_ITEM(value, i))) return false;
  } else if (!read(value)) {
    return false;
  }
  if (ints.size() == 1) ints.resize(rank, ints[0]);
  return true;
}

// Padding: as above, and an entry may be a pair of its low and high side.
bool read_sides(PyObject* value, int rank, Ints& low, Ints& high) {
  if (read_ints(value, rank, 0, low)) return high = low, true;
  low.clear();
  if (!PyTuple_CheckExact(value) && !PyList_CheckExact(value)) return false;
  const Py_ssize_t n = PySequence_Fast_GET_SIZE(value);
  if (n != 1 && n != rank) return false;
  for (Py_ssize_t i = 0; i < n; ++i) {
    PyObject* entry = PySequence_Fast_GET_ITEM(value, i);
    Ints sides;
    if (PyTuple_CheckExact(entry) && PyTuple_GET_SIZE(entry) != 2) return false;
    if (!read_ints(entry, 2, 0, sides)) return false;
    low.push_back(sides[0]);
    high.push_back(sides[1]);
  }
  if (n == 1) low.resize(rank, low[0]), high.resize(rank, high[0]);
  return true;
}

bool read_mode(PyObject* value, PaddingMode& mode) {
  if (!value) return true;
  if (!PyUnicode_CheckExact(value)) return false;
  for (size_t i = 0; i < kModes.size(); ++i)
    if (PyUnicode_CompareWithASCIIString(value, kModes[i]) == 0) return mode = static_cast<PaddingMode>(i), true;
  return false;
}

bool is_plain_tensor(PyObject* object) {
  if (!object || !THPVariable_CheckTypeExact(Py_TYPE(object))) return false;
  const Tensor& tensor = THPVariable_Unpack(object);
  return tensor.layout() == at::kStrided && !tensor.is_nested() &&
         !tensor.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
}

Tensor convolve(const Call& call, const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  const Sizes size = check_call(call);
  check_storage(input, weight, bias);
  const bool batched = input.dim() == call.rank + 2;
  const Tensor x = batched ? input : input.unsqueeze(0);
  const auto sym = [](c10::IntArrayRef ints) { return c10::fromIntArrayRefKnownNonNegative(ints); };
  const auto op = call.transposed ? conv_backward_input : conv_forward;
  Tensor y = op(x, weight, bias, sym(size), sym(call.stride), sym(call.padding), sym(call.dilation), call.groups,
                static_cast<int64_t>(call.padding_mode));
  // Torch gives a convolution over no channels no channels.
  if (!call.transposed && x.size(1) == 0) y = y.narrow(1, 0, 0);
  return batched ? y : y.squeeze(0);
}

template <int rank, bool transposed>
PyObject* entry(PyObject*, PyObject* const* args, Py_ssize_t count, PyObject* keywords) {
  HANDLE_TH_ERRORS
  constexpr const auto& order = transposed ? kTransposeOrder : kConvOrder;
  constexpr Py_ssize_t positions = transposed ? 8 : 7;
  std::array<PyObject*, kSlots> slots{};
  bool plain = count <= positions && !at::impl::torch_function_mode_enabled();
  for (Py_ssize_t i = 0; plain && i < count; ++i) slots[order[i]] = args[i];
  const Py_ssize_t named = keywords ? PyTuple_GET_SIZE(keywords) : 0;
  for (Py_ssize_t i = 0; plain && i < named; ++i) {
    PyObject* keyword = PyTuple_GET_ITEM(keywords, i);
    int slot = 0;
    while (slot < kSlots && PyUnicode_CompareWithASCIIString(keyword, kNames[slot]) != 0) ++slot;
    plain = slot < kSlots && !slots[slot] && (transposed || slot != kOutputPadding);
    if (plain) slots[slot] = args[count + i];
  }
  if (slots[kBias] == Py_None) slots[kBias] = nullptr;

  Ints stride, low, high, dilation, output_padding, groups;
  PaddingMode mode = PaddingMode::kZeros;
  plain = plain && is_plain_tensor(slots[kInput]) && is_plain_tensor(slots[kWeight]) &&
          (!slots[kBias] || is_plain_tensor(slots[kBias])) && read_ints(slots[kStride], rank, 1, stride) &&
          read_sides(slots[kPadding], rank, low, high) && read_ints(slots[kDilation], rank, 1, dilation) &&
          read_ints(slots[kOutputPadding], rank, 0, output_padding) &&
          (!slots[kGroups] || PyLong_CheckExact(slots[kGroups])) && read_ints(slots[kGroups], 1, 1, groups) &&
          read_mode(slots[kPaddingMode], mode);
  if (!plain) return PyObject_Vectorcall(general[transposed][rank - 1], args, count, keywords);

  const Tensor& input = THPVariable_Unpack(slots[kInput]);
  const Tensor& weight = THPVariable_Unpack(slots[kWeight]);
  const OptionalTensor bias = slots[kBias] ? OptionalTensor(THPVariable_Unpack(slots[kBias])) : std::nullopt;
  Tensor y;
  {
    const py::gil_scoped_release no_gil;
    const Call call{kFunctions[transposed][rank - 1],
                    rank,
                    transposed,
                    input.sizes(),
                    weight.sizes(),
                    bias ? std::make_optional(bias->sizes()) : std::nullopt,
                    stride,
                    low,
                    high,
                    output_padding,
                    dilation,
                    groups[0],
                    mode};
    y = convolve(call, input, weight, bias);
  }
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

PyCFunction as_c_function(_PyCFunctionFastWithKeywords f) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(f));
}

// The text before "--" is what inspect.signature reads.
#define MYCONV_CONV_DOC(name)                                                                                         \
  name "($module, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *, padding_mode='zeros')\n"    \
       "--\n\n"                                                                                                       \
       "torch.nn.functional." name                                                                                    \
       " with more kinds of padding, computed by myconv.\n\n"                                                         \
       "input: (N, C, spatial...) or (C, spatial...). weight: (K, C / groups, kernel...). bias: (K). All of one "     \
       "dtype\n"                                                                                                      \
       "and on the CPU: floating point, complex, or integers up to int64.\n"                                          \
       "stride, dilation: an int, or one for each axis.\n"                                                            \
       "padding: an int, or for each axis an int or a pair (low, high) of amounts; 'valid'; 'same' (stride 1); for\n" \
       "conv1d 'causal', dilation * (kernel - 1) on the low side alone.\n"                                            \
       "padding_mode: 'zeros', 'reflect', 'replicate' or 'circular'.\n\n"                                             \
       "Returns (N, K, out...) or (K, out...), out = (in + low + high - dilation * (kernel - 1) - 1) // stride + "    \
       "1.\n\n"                                                                                                       \
       "Raises RuntimeError for sizes that do not fit, TypeError and ValueError for arguments of the wrong kind,\n"   \
       "NotImplementedError for other dtypes. Gradients of any order, in reverse and forward mode.\n"
#define MYCONV_TRANSPOSE_DOC(name)                                                                                  \
  name "($module, input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1, *, "       \
       "padding_mode='zeros')\n--\n\n"                                                                              \
       "torch.nn.functional." name                                                                                  \
       " with more kinds of padding, computed by myconv.\n\n"                                                       \
       "The adjoint of the convolution with the same arguments: what is its input gradient.\n\n"                    \
       "input: (N, C, spatial...) or (C, spatial...). weight: (C, K / groups, kernel...). bias: (K). All of one "   \
       "dtype\n"                                                                                                    \
       "and on the CPU: floating point, complex, or int64.\n"                                                       \
       "stride, dilation: an int, or one for each axis. output_padding likewise, below stride or dilation.\n"       \
       "padding: an int, or for each axis an int or a pair (low, high) of amounts cut from the result.\n"           \
       "padding_mode: 'zeros', or 'reflect', 'replicate' or 'circular': the adjoint of padding in that mode.\n\n"   \
       "Returns (N, K, out...) or (K, out...),\n"                                                                   \
       "out = (in - 1) * stride - low - high + dilation * (kernel - 1) + output_padding + 1.\n\n"                   \
       "Raises RuntimeError for sizes that do not fit, TypeError and ValueError for arguments of the wrong kind,\n" \
       "NotImplementedError for other dtypes. Gradients of any order, in reverse and forward mode.\n"

PyMethodDef kEntries[] = {
    {"conv1d", as_c_function(entry<1, false>), METH_FASTCALL | METH_KEYWORDS, MYCONV_CONV_DOC("conv1d")},
    {"conv2d", as_c_function(entry<2, false>), METH_FASTCALL | METH_KEYWORDS, MYCONV_CONV_DOC("conv2d")},
    {"conv3d", as_c_function(entry<3, false>), METH_FASTCALL | METH_KEYWORDS, MYCONV_CONV_DOC("conv3d")},
    {"conv_transpose1d", as_c_function(entry<1, true>), METH_FASTCALL | METH_KEYWORDS,
     MYCONV_TRANSPOSE_DOC("conv_transpose1d")},
    {"conv_transpose2d", as_c_function(entry<2, true>), METH_FASTCALL | METH_KEYWORDS,
     MYCONV_TRANSPOSE_DOC("conv_transpose2d")},
    {"conv_transpose3d", as_c_function(entry<3, true>), METH_FASTCALL | METH_KEYWORDS,
     MYCONV_TRANSPOSE_DOC("conv_transpose3d")},
    {nullptr, nullptr, 0, nullptr},
};

constexpr const char* kDirectionNames[] = {"forward", "backward_input", "backward_weight"};  // in Direction's order

Direction direction_named(const std::string& name) {
  for (int d = 0; d < kDirections; ++d)
    if (name == kDirectionNames[d]) return static_cast<Direction>(d);
  throw py::value_error("direction must be 'forward', 'backward_input' or 'backward_weight', got '" + name + "'");
}

const AlgorithmTable& table_of(const std::string& direction, const std::string& device) {
  if (device == "cpu") return cpu::table(direction_named(direction));
#if defined(MYCONV_CUDA)
  if (device == "cuda") return cuda::table(direction_named(direction));
#endif
  throw py::value_error("this build has no kernels for device '" + device + "'");
}

using IntList = std::vector<int64_t>;
using OptionalList = std::optional<IntList>;

std::optional<c10::IntArrayRef> as_ref(const OptionalList& list) {
  return list ? std::make_optional(c10::IntArrayRef(*list)) : std::nullopt;
}

IntList check_call_lists(const std::string& name, int rank, bool transposed, const IntList& input,
                         const IntList& weight, const OptionalList& bias, const IntList& stride, const IntList& padding,
                         const IntList& padding_high, const IntList& output_padding, const IntList& dilation,
                         int64_t groups, int64_t padding_mode) {
  const Sizes size =
      check_call({name.c_str(), rank, transposed, input, weight, as_ref(bias), stride, padding, padding_high,
                  output_padding, dilation, groups, static_cast<PaddingMode>(padding_mode)});
  return IntList(size.begin(), size.end());
}

// Every row of a direction's table and why it does not take the given convolution ("": it does); with may_yield, rows
// that are slower than a later one give that as a reason, without it only what they decline even if forced.
std::vector<std::pair<std::string, std::string>> selection(
    const std::string& direction, const IntList& input_size, const IntList& weight_size, const IntList& output_size,
    const IntList& stride, const IntList& padding, const IntList& dilation, int64_t groups, int64_t padding_mode,
    at::ScalarType dtype, bool channels_last, const std::string& device, bool may_yield) {
  IntList output{input_size.at(0), weight_size.at(0)}, weight_strides(weight_size.size(), 1);
  output.insert(output.end(), output_size.begin(), output_size.end());
  // The weight has the layout of the activations: dimensions from the innermost out.
  const auto dimensions = static_cast<int64_t>(weight_size.size());
  int64_t step = 1;
  for (int64_t i = 0; i < dimensions; ++i) {
    const int64_t last = dimensions - 1, d = i == last ? 0 : !channels_last ? last - i : i == 0 ? 1 : last - i + 1;
    weight_strides[d] = step, step *= weight_size[d];
  }
  const Direction d = direction_named(direction);
  const OperatorCall<int64_t> call{"selection", d,       input_size, weight_size, output,      std::nullopt,
                                   stride,      padding, dilation,   groups,      padding_mode};
  check_operator(call);
  const ConvShape shape = make_conv_shape(call, weight_strides, dtype, channels_last);
  return (may_yield ? reasons : declines)(table_of(direction, device), shape);
}

// What explain() is told of the convolutions that f() calls; their kernels do not run.
py::list record(const py::function& f) {
  Recording recorded;
  {
    struct Recorder {
      Recording* before = recording();
      explicit Recorder(Recording* r) { record_into(r); }
      ~Recorder() { record_into(before); }
    } const recorder(&recorded);
    f();
  }
  py::list choices;
  for (const Choice& c : recorded.choices) {
    const Packing& packing = c.algorithm->packing;
    choices.append(py::dict(
        "direction"_a = kDirectionNames[static_cast<int>(c.direction)], "algorithm"_a = c.algorithm->name,
        "rows"_a = c.rows, "isa"_a = c.isa, "channels_last"_a = c.shape.channels_last(), "workspace"_a = c.workspace,
        "packing"_a = c.shape.channels_last() ? packing.channels_last : packing.channels_first, "copies"_a = c.copies));
  }
  return choices;
}

}  // namespace
}  // namespace myconv

PYBIND11_MODULE(_C, m) {
  using namespace myconv;
  m.doc() = "The compiled part of myconv: operators, fast entries and introspection.";
  if (PyModule_AddFunctions(m.ptr(), kEntries) != 0) throw py::error_already_set();
  m.def("set_general", [](const std::string& name, py::object function) {
    for (int t = 0; t < 2; ++t)
      for (int r = 0; r < 3; ++r)
        if (name == kFunctions[t][r]) {
          Py_XDECREF(general[t][r]);
          general[t][r] = function.release().ptr();
          return;
        }
    throw py::value_error("no entry is called " + name);
  });
  m.def("check_call", &check_call_lists);
  m.def("check_storage", &check_storage);
  m.def("isas", &cpu::runnable_isas);
  m.def("isa", &cpu::isa_in_force);
  m.def("cap_isa", &cpu::cap_isa);
  m.def("isa_cap", &cpu::isa_cap);
  m.def("openmp", [] { return cpu::parallel_regions(); });
  m.def("devices",
        [] { return kCudaKernels ? std::vector<std::string>{"cpu", "cuda"} : std::vector<std::string>{"cpu"}; });
  m.def(
      "algorithms",
      [](const std::string& direction, const std::string& device) {
        const AlgorithmTable& table = table_of(direction, device);
        std::vector<std::string> names;
        for (int i = 0; i < table.size; ++i) names.emplace_back(table.rows[i].name);
        return names;
      },
      "direction"_a, "device"_a = "cpu");
  m.def("force_algorithm", [](const std::string& direction, const std::optional<std::string>& name) {
    force_algorithm(direction_named(direction), name ? name->c_str() : nullptr);
  });
  m.def("forced_algorithm", [](const std::string& direction) -> std::optional<std::string> {
    const char* name = forced_algorithm(direction_named(direction));
    return name ? std::make_optional<std::string>(name) : std::nullopt;
  });
  m.def("exclude_algorithms", &exclude_algorithms);
  m.def("excluded_algorithms", &excluded_algorithms);
  m.def("set_flush_denormals", &set_flush_denormals);
  m.def("flush_denormals", &flush_denormals);
  m.def("kept_memory", &cpu::kept_memory);
  m.def("release_kept_memory", &cpu::release_kept_memory);
  m.def("selection", &selection, "direction"_a, "input_size"_a, "weight_size"_a, "output_size"_a, "stride"_a,
        "padding"_a, "dilation"_a, "groups"_a, "padding_mode"_a, "dtype"_a, "channels_last"_a, "device"_a = "cpu",
        "may_yield"_a = false);
  m.def("record", &record);
}
