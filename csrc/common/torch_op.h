// What every op needs to stand between torch and a kernel: threads, checks, allocation, types.
// For `*_op.cpp` and `*_op_cuda.cpp` only. Nothing here leaves the LibTorch stable ABI of 2.11.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <exception>
#include <initializer_list>
#include <mutex>
#include <optional>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/bfloat16.h"
#include "common/parallel.h"
#include "common/task_ranges.h"

namespace transformer_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Kernels on torch's own threads (as many as torch.get_num_threads() says), so that the process
// has one set of threads.
class TorchParallel final : public Parallel {
 public:
  int threads() const override {
    uint32_t count = 1;
    TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&count));
    return static_cast<int>(count);
  }

  void for_each(int64_t count, FunctionRef<void(int64_t)> task) override {
    if (count <= 1) {
      if (count == 1) task(0);
      return;
    }
    const int64_t workers = threads() < count ? threads() : count;
    Job job{task, TaskRanges(count, workers)};
    TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, workers, 1, &Job::work, &job));
    if (job.error) std::rethrow_exception(job.error);
  }

 private:
  struct Job {
    FunctionRef<void(int64_t)> task;
    TaskRanges ranges;
    std::mutex error_mutex{};
    std::exception_ptr error{};

    // The range given is of workers, not of tasks; torch may give several workers' share to one,
    // who then helps with the tasks of those that do not come.
    static void work(int64_t worker, int64_t, void* context) {
      Job& job = *static_cast<Job*>(context);
      for (int64_t i; (i = job.ranges.next(worker)) >= 0;) {
        try {
          job.task(i);
        } catch (...) {
          const std::lock_guard<std::mutex> lock(job.error_mutex);
          if (!job.error) job.error = std::current_exception();
          job.ranges.stop();
        }
      }
    }
  };
};

// ---- Errors ---------------------------------------------------------------------------------

template <class... Parts>
std::string joined(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// Python sees std::out_of_range (what a tensor holds) as an IndexError, std::invalid_argument (all
// else about arguments) as a ValueError, from torch 2.15 on as a RuntimeError, with the text as it
// stands here; that of STD_TORCH_CHECK would begin with the path of the source.
#define CHECK_AS(Exception, condition, ...) \
  if (!(condition)) [[unlikely]]            \
  throw Exception(::transformer_ext::joined(__VA_ARGS__))

#define CHECK_ARGUMENT(condition, ...) CHECK_AS(std::invalid_argument, condition, __VA_ARGS__)

// ---- Types ----------------------------------------------------------------------------------

template <class T>
constexpr ScalarType scalar_type_of() {
  if constexpr (std::is_same_v<T, float>) return ScalarType::Float;
  if constexpr (std::is_same_v<T, bfloat16>) return ScalarType::BFloat16;
  if constexpr (std::is_same_v<T, int64_t>) return ScalarType::Long;
  if constexpr (std::is_same_v<T, int32_t>) return ScalarType::Int;
  if constexpr (std::is_same_v<T, uint8_t>) return ScalarType::Byte;
  if constexpr (std::is_same_v<T, bool>) return ScalarType::Bool;
}

template <class T>
struct TypeTag {
  using type = T;
};

// Calls f(TypeTag<float>{}) or f(TypeTag<bfloat16>{}) by the type of `x`; an error names the
// argument for any other. In f: `using T = typename decltype(tag)::type;`.
template <class F>
auto dispatch_float(const Tensor& x, const char* argument, F&& f) {
  const ScalarType type = x.scalar_type();
  CHECK_ARGUMENT(type == ScalarType::Float || type == ScalarType::BFloat16, argument, ": got ",
                 torch::headeronly::toString(type), ", expected float32 or bfloat16");
  return type == ScalarType::Float ? f(TypeTag<float>{}) : f(TypeTag<bfloat16>{});
}

// ---- Checks: each error names the argument, what came, and what was expected ------------------

inline std::string shape_string(std::span<const int64_t> sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) {
    text += (i ? ", " : "") + std::to_string(sizes[i]);
  }
  return text + "]";
}

inline std::span<const int64_t> sizes_of(const Tensor& x) {
  return {x.sizes().data(), x.sizes().size()};
}

inline void check_type(const Tensor& x, const char* argument, ScalarType expected) {
  CHECK_ARGUMENT(x.scalar_type() == expected, argument, ": got ",
                 torch::headeronly::toString(x.scalar_type()), ", expected ",
                 torch::headeronly::toString(expected));
}

inline void check_dim(const Tensor& x, const char* argument, int64_t expected) {
  CHECK_ARGUMENT(x.dim() == expected, argument, ": got shape ", shape_string(sizes_of(x)),
                 ", expected ", expected, " dimensions");
}

// -1 stands for any size.
inline void check_shape(const Tensor& x, const char* argument,
                        std::initializer_list<int64_t> expected) {
  bool ok = x.dim() == static_cast<int64_t>(expected.size());
  for (size_t i = 0; ok && i < expected.size(); ++i) {
    const int64_t want = expected.begin()[i];
    ok = want == -1 || x.size(static_cast<int64_t>(i)) == want;
  }
  CHECK_ARGUMENT(ok, argument, ": got shape ", shape_string(sizes_of(x)), ", expected ",
                 shape_string({expected.begin(), expected.size()}), " (-1: any)");
}

inline void check_contiguous(const Tensor& x, const char* argument) {
  CHECK_ARGUMENT(x.is_contiguous(), argument, ": got strides ",
                 shape_string({x.strides().data(), x.strides().size()}),
                 ", expected a contiguous tensor");
}

// On the CPU: a GPU would have to be waited for.
inline void check_lengths(const int64_t* lengths, const char* argument, int64_t count,
                          int64_t longest) {
  for (int64_t i = 0; lengths != nullptr && i < count; ++i) {
    CHECK_AS(std::out_of_range, lengths[i] >= 0 && lengths[i] <= longest, argument, ": got ",
             lengths[i], ", expected 0 to ", longest);
  }
}

// "cpu", "cuda:1", "another device".
inline std::string device_string(const Tensor& x) {
  const auto device = x.device();
  if (device.is_cpu()) return "cpu";
  return device.is_cuda() ? "cuda:" + std::to_string(device.index()) : "another device";
}

inline void check_device(const Tensor& x, const char* argument, const Tensor& like) {
  CHECK_ARGUMENT(x.device() == like.device(), argument, ": is on ", device_string(x), ", expected ",
                 device_string(like), ", the device of the others");
}

// ---- Memory ---------------------------------------------------------------------------------

// Typed pointer to the first element; the type is checked.
template <class T>
const T* data(const Tensor& x, const char* argument) {
  check_type(x, argument, scalar_type_of<T>());
  return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& x, const char* argument) {
  check_type(x, argument, scalar_type_of<T>());
  return static_cast<T*>(x.mutable_data_ptr());
}

template <class T>
const T* data_or_null(const std::optional<Tensor>& x, const char* argument) {
  return x ? data<T>(*x, argument) : nullptr;
}

// An uninitialised contiguous tensor on the device of `like`. Through the shim for AOTInductor, not
// stable::new_empty, which goes boxed through the dispatcher (0.5 us against 1.5 us).
inline Tensor empty(std::span<const int64_t> sizes, ScalarType type, const Tensor& like) {
  constexpr size_t kMaxDim = 16;
  CHECK_ARGUMENT(sizes.size() <= kMaxDim, "a tensor of more than 16 dimensions");
  int64_t strides[kMaxDim];
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  int32_t device_type = 0;
  int32_t device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  int32_t dtype = 0;
  switch (type) {
    case ScalarType::Float:
      dtype = aoti_torch_dtype_float32();
      break;
    case ScalarType::Double:
      dtype = aoti_torch_dtype_float64();
      break;
    case ScalarType::BFloat16:
      dtype = aoti_torch_dtype_bfloat16();
      break;
    case ScalarType::Half:
      dtype = aoti_torch_dtype_float16();
      break;
    case ScalarType::Long:
      dtype = aoti_torch_dtype_int64();
      break;
    case ScalarType::Int:
      dtype = aoti_torch_dtype_int32();
      break;
    case ScalarType::Byte:
      dtype = aoti_torch_dtype_uint8();
      break;
    case ScalarType::Char:
      dtype = aoti_torch_dtype_int8();
      break;
    case ScalarType::Bool:
      dtype = aoti_torch_dtype_bool();
      break;
    default:
      CHECK_ARGUMENT(false, "empty: type ", torch::headeronly::toString(type));
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides, dtype, device_type, device_index,
                                                  &handle));
  return Tensor(handle);
}

inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type, const Tensor& like) {
  return empty(std::span<const int64_t>(sizes.begin(), sizes.size()), type, like);
}

// Contiguous, whatever the strides of `like`.
inline Tensor empty_like(const Tensor& like) {
  return empty(sizes_of(like), like.scalar_type(), like);
}

inline Tensor zeros(std::initializer_list<int64_t> sizes, ScalarType type, const Tensor& like) {
  Tensor x = empty(sizes, type, like);
  TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(x.get()));
  return x;
}

}  // namespace transformer_ext
