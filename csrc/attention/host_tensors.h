// A problem's tensors as the kernels take them: the copy engine's maps, outputs, parameters. Host code: api.cpp alone
// includes it.
#pragma once

#include "attention/host_problem.h"

namespace genrec::attention {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// Looked up at run time, so that the library loads where there is no driver.
inline EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(found)
                                                                         : nullptr;
  }();
  return function;
}

// A thread that has not used CUDA before has no context, and the driver's own functions want one: autograd's thread in
// its first backward pass. It gets the context of the device that holds `data`.
inline bool enter_context(const void* data) {
  cudaPointerAttributes attributes;
  return cudaPointerGetAttributes(&attributes, data) == cudaSuccess && attributes.type == cudaMemoryTypeDevice &&
         cudaSetDevice(attributes.device) == cudaSuccess;
}

// A (rows, heads, dim) tensor read in boxes of `box_rows` rows of one head, 64 columns (all, where the instance has
// fewer); what lies beyond `rows` or `dim` reads as zero.
inline int32_t encode(CUtensorMap* map, const char* name, const genrec_attention_problem& p,
               const genrec_attention_tensor* tensor, int64_t rows, int dim, int instance_dim, int box_rows) {
  if (tensor == nullptr || tensor->data == nullptr) return fail(std::string(name) + " is missing");
  if (reinterpret_cast<uintptr_t>(tensor->data) % 16 != 0) return fail(std::string(name) + " is not 16-byte aligned");
  if (tensor->row_stride % 8 != 0 || (p.heads > 1 && tensor->head_stride % 8 != 0))
    return fail(std::string("the strides of ") + name + " are not multiples of 8 elements");
  if (encode_tiled() == nullptr) return fail("the CUDA driver has no cuTensorMapEncodeTiled: it needs CUDA 12 or newer");
  const int columns = instance_dim < 64 ? instance_dim : 64;
  // A stride that nothing is reached by must still be a valid one.
  const int64_t head_stride = p.heads > 1 ? tensor->head_stride : dim;
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(dim), static_cast<cuuint64_t>(p.heads),
                               static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(head_stride) * 2,
                                 static_cast<cuuint64_t>(tensor->row_stride) * 2};
  const cuuint32_t box[3] = {static_cast<cuuint32_t>(columns), 1, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[3] = {1, 1, 1};
  const auto encode_once = [&] {
    return encode_tiled()(
        map, p.dtype == 0 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3, tensor->data, sizes,
        strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
        columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = encode_once();
  if (result == CUDA_ERROR_INVALID_CONTEXT && enter_context(tensor->data)) result = encode_once();
  if (result != CUDA_SUCCESS)
    return fail(std::string("cuTensorMapEncodeTiled refused ") + name + " with error " + std::to_string(result));
  return 0;
}

inline int32_t check_output(const char* name, const genrec_attention_tensor* tensor) {
  if (tensor == nullptr || tensor->data == nullptr) return fail(std::string(name) + " is missing");
  if (reinterpret_cast<uintptr_t>(tensor->data) % 16 != 0 || tensor->row_stride % 8 != 0 || tensor->head_stride % 8 != 0)
    return fail(std::string(name) + " is not 16-byte aligned in every row");
  return 0;
}

inline Output output(const genrec_attention_tensor* tensor, int dim) {
  return {tensor->data, tensor->row_stride, tensor->head_stride, dim};
}

inline Common common(const genrec_attention_problem& p, int* counter) {
  return {mask_rule(p), p.heads, 0.5f * p.alpha, p.scale, p.scales, counter};
}

inline BiasParams bias_params(const genrec_attention_bias& b) {
  return {{b.position, b.time, b.edges, b.key_times, b.query_times, b.max_positions, b.buckets, nullptr, nullptr, {}},
          {b.dense, b.dense_batch_stride, b.dense_head_stride, b.dense_row_stride, b.d_dense, b.d_dense_batch_stride,
           b.d_dense_head_stride, b.d_dense_row_stride}};
}

}  // namespace genrec::attention
