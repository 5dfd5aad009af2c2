// The few pieces of ONNX Runtime's C ABI that a custom-op library needs, declared here because its wheel ships no header.
//
// The ABI only ever grows at its end: position and signature of an entry never change (the rules beside the table in
// onnxruntime/core/session/onnxruntime_c_api.cc). Positions are those of API version 17, of ONNX Runtime 1.17 and later.
#pragma once

#include <cstddef>
#include <cstdint>

namespace wicore::ort {

constexpr uint32_t kApiVersion = 17;

struct Status;  // null is success
struct Value;
struct ShapeInfo;
struct KernelInfo;
struct KernelContext;
struct SessionOptions;
struct CustomOpDomain;
struct CustomOp;

enum ElementType : int { kFloat = 1, kUint8 = 2, kInt32 = 6, kFloat16 = 10 };
enum ErrorCode : int { kFail = 1 };
enum Characteristic : int { kRequired = 0, kOptional = 1 };

// The function table, by position.
class Api {
 public:
  Status* create_status(ErrorCode code, const char* message) const {
    return entry<Status* (*)(int, const char*)>(0)(code, message);
  }
  Status* create_domain(const char* name, CustomOpDomain** out) const {
    return entry<Status* (*)(const char*, CustomOpDomain**)>(26)(name, out);
  }
  Status* add_op(CustomOpDomain* domain, const CustomOp* op) const {
    return entry<Status* (*)(CustomOpDomain*, const CustomOp*)>(27)(domain, op);
  }
  Status* add_domain(SessionOptions* options, CustomOpDomain* domain) const {
    return entry<Status* (*)(SessionOptions*, CustomOpDomain*)>(28)(options, domain);
  }
  Status* tensor_data(const Value* value, void** out) const {
    return entry<Status* (*)(const Value*, void**)>(51)(value, out);
  }
  Status* rank(const ShapeInfo* info, size_t* out) const {
    return entry<Status* (*)(const ShapeInfo*, size_t*)>(61)(info, out);
  }
  Status* dimensions(const ShapeInfo* info, int64_t* out, size_t count) const {
    return entry<Status* (*)(const ShapeInfo*, int64_t*, size_t)>(62)(info, out, count);
  }
  Status* shape(const Value* value, ShapeInfo** out) const {
    return entry<Status* (*)(const Value*, ShapeInfo**)>(65)(value, out);
  }
  Status* float_attribute(const KernelInfo* info, const char* name, float* out) const {
    return entry<Status* (*)(const KernelInfo*, const char*, float*)>(85)(info, name, out);
  }
  Status* int_attribute(const KernelInfo* info, const char* name, int64_t* out) const {
    return entry<Status* (*)(const KernelInfo*, const char*, int64_t*)>(86)(info, name, out);
  }
  Status* input(const KernelContext* context, size_t index, const Value** out) const {
    return entry<Status* (*)(const KernelContext*, size_t, const Value**)>(90)(context, index, out);
  }
  Status* output(KernelContext* context, size_t index, const int64_t* dims, size_t rank, Value** out) const {
    return entry<Status* (*)(KernelContext*, size_t, const int64_t*, size_t, Value**)>(91)(context, index, dims, rank,
                                                                                         out);
  }
  void release_status(Status* status) const { entry<void (*)(Status*)>(93)(status); }
  void release_shape(ShapeInfo* info) const { entry<void (*)(ShapeInfo*)>(99)(info); }
  Status* constant_input(const KernelInfo* info, size_t index, int* is_constant, const Value** out) const {
    return entry<Status* (*)(const KernelInfo*, size_t, int*, const Value**)>(249)(info, index, is_constant, out);
  }
  // Calls work(data, i) for every i below `total` on the session's intra-op threads, the calling one among them.
  Status* parallel_for(const KernelContext* context, void (*work)(void*, size_t), size_t total, void* data) const {
    return entry<Status* (*)(const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>(274)(
        context, work, total, 0, data);
  }

 private:
  template <typename Function>
  Function entry(size_t position) const {
    return reinterpret_cast<Function>(reinterpret_cast<void* const*>(this)[position]);
  }
};

struct ApiBase {
  const Api* (*get_api)(uint32_t version);
  const char* (*version_string)();
};

// Callbacks that stay null are of versions or features that are not used.
struct CustomOp {
  uint32_t version = kApiVersion;
  void* (*create_kernel)(const CustomOp*, const Api*, const KernelInfo*) = nullptr;
  const char* (*name)(const CustomOp*) = nullptr;
  const char* (*execution_provider)(const CustomOp*) = nullptr;
  int (*input_type)(const CustomOp*, size_t) = nullptr;
  size_t (*input_count)(const CustomOp*) = nullptr;
  int (*output_type)(const CustomOp*, size_t) = nullptr;
  size_t (*output_count)(const CustomOp*) = nullptr;
  void (*compute)(void*, KernelContext*) = nullptr;
  void (*destroy)(void*) = nullptr;
  int (*input_characteristic)(const CustomOp*, size_t) = nullptr;
  int (*output_characteristic)(const CustomOp*, size_t) = nullptr;
  int (*input_memory_type)(const CustomOp*, size_t) = nullptr;
  int (*variadic_input_min_arity)(const CustomOp*) = nullptr;
  int (*variadic_input_homogeneity)(const CustomOp*) = nullptr;
  int (*variadic_output_min_arity)(const CustomOp*) = nullptr;
  int (*variadic_output_homogeneity)(const CustomOp*) = nullptr;
  Status* (*create_kernel_v2)(const CustomOp*, const Api*, const KernelInfo*, void**) = nullptr;
  Status* (*compute_v2)(void*, KernelContext*) = nullptr;
  Status* (*infer_output_shape)(const CustomOp*, void*) = nullptr;
  int (*start_version)(const CustomOp*) = nullptr;
  int (*end_version)(const CustomOp*) = nullptr;
  size_t (*may_inplace)(int**, int**) = nullptr;
  void (*release_may_inplace)(int*, int*) = nullptr;
  size_t (*alias_map)(int**, int**) = nullptr;
  void (*release_alias_map)(int*, int*) = nullptr;
};

}  // namespace wicore::ort
