// Runs a model of myconv modules in C++: as AOTInductor compiled it, as TorchScript, and one operator by hand.
//
//   make cpp
//
// does all of it. Step by step, with TORCH=$(python -c 'import torch; print(torch.utils.cmake_prefix_path)'):
//
//   cmake -B build/cmake -DCMAKE_PREFIX_PATH=$TORCH && cmake --build build/cmake -j       libmyconv.so
//   python examples/cpp/export_model.py build/cpp                                         the model
//   cmake -S examples/cpp -B build/cpp -DCMAKE_PREFIX_PATH=$TORCH && cmake --build build/cpp
//   build/cpp/run_model build/cpp
//
// The exit status is 1 if a result differs from what Python computed, or from torch's convolution.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>
#include <torch/serialize.h>

#include <cstdio>
#include <fstream>
#include <functional>
#include <iterator>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace {

using at::Tensor;

// An operator, called through torch's dispatcher. The handle is looked up once.
Tensor conv2d(const Tensor& x, const Tensor& w, const Tensor& b, int64_t stride, int64_t padding) {
  static const auto conv_forward =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("myconv::conv_forward", "")
          .typed<Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, c10::SymIntArrayRef,
                        c10::SymIntArrayRef, c10::SymIntArrayRef, c10::SymIntArrayRef, c10::SymInt, int64_t)>();
  const auto size = [&](int64_t axis) { return (x.size(axis) + 2 * padding - w.size(axis)) / stride + 1; };
  return conv_forward.call(x, w, b, {size(2), size(3)}, {stride, stride}, {padding, padding}, {1, 1}, 1, 0);
}

std::vector<char> read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, "cannot read ", path);
  return {std::istreambuf_iterator<char>(file), {}};
}

bool check(bool passed, const std::string& what) {
  std::printf("%-6s %s\n", passed ? "ok" : "FAILED", what.c_str());
  return passed;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 2) {
    std::fprintf(stderr, "usage: run_model folder\n");
    return 2;
  }
  const std::string folder = std::string(argv[1]) + "/";
  const c10::InferenceMode no_gradients;

  torch::inductor::AOTIModelPackageLoader package(folder + "model.pt2");
  torch::jit::Module script = torch::jit::load(folder + "model.ts.pt");
  const auto sample = torch::pickle_load(read(folder + "sample.pt")).toGenericDict();  // of torch.save
  const Tensor x = sample.at("input").toTensor(), expected = sample.at("output").toTensor();

  const std::pair<std::string, std::function<Tensor(const Tensor&)>> models[] = {
      {"AOTInductor", [&](const Tensor& input) { return package.run({input}).at(0); }},
      {"TorchScript", [&](const Tensor& input) { return script.forward({input}).toTensor(); }},
  };
  bool passed = true;
  for (const auto& [name, run] : models) {
    const Tensor all = run(x), first = run(x.narrow(0, 0, 1));
    passed &= check(at::allclose(all, expected, 1e-5, 1e-5), name + ", batch 8: the values of Python");
    passed &=
        check(at::allclose(first, expected.narrow(0, 0, 1), 1e-5, 1e-5), name + ", batch 1: the values of Python");
    passed &= check(at::equal(first, all.narrow(0, 0, 1)), name + ": sample 0 has the same bits in both batches");
  }

  const Tensor w = at::randn({16, 3, 3, 3}), b = at::randn({16});
  passed &= check(at::allclose(conv2d(x, w, b, 2, 1), at::conv2d(x, w, b, 2, 1), 1e-5, 1e-5),
                  "myconv::conv_forward, called from C++: the values of at::conv2d");

  const std::vector<char> maps = read("/proc/self/maps");  // the libraries of the process, the model's among them
  const std::string loaded(maps.begin(), maps.end());
  passed &= check(loaded.find("libpython") == loaded.npos && loaded.find("torch_python") == loaded.npos,
                  "no Python in this process");
  return passed ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "run_model: %s\n", error.what());
  return 1;
}
