// The namespace accel_kernels of PyTorch's dispatcher. The operators are in the other files of this
// folder, each with its schema. Loaded with torch.ops.load_library, never imported.

#include <torch/library.h>
#include <torch/version.h>

#include <string>

namespace accel_kernels {
namespace {

std::string built_for() { return TORCH_VERSION; }

bool has_cuda() {
#ifdef ACCEL_WITH_CUDA
  return true;
#else
  return false;
#endif
}

}  // namespace
}  // namespace accel_kernels

TORCH_LIBRARY(accel_kernels, m) {
  m.def("built_for() -> str", &accel_kernels::built_for);
  m.def("has_cuda() -> bool", &accel_kernels::has_cuda);
}
