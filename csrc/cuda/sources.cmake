# The files of the CUDA kernels, for both builds: nvcc's for the GPU, and the SIMT runner's for the CPU.
# The FFN's are of a family, chosen by the GPU (ffn/ffn_kernels.h); the others run on every GPU.
set(LOCAS_CUDA_KERNELS
  dispatch.cu
  elementwise/glu_activation.cu
  elementwise/norms.cu
  elementwise/peer_sum.cu
  elementwise/rotary.cu
  elementwise/token_nll.cu
  slots/update.cu
  slots/update_from_factors.cu
  slots/write_slots.cu)
set(LOCAS_CUDA_SM80
  ffn/sm80/backward.cu
  ffn/sm80/decode.cu
  ffn/sm80/decode_backward.cu
  ffn/sm80/forward.cu
  ffn/sm80/table.cpp)
set(LOCAS_CUDA_SM90
  ffn/sm90/backward.cu
  ffn/sm90/forward.cu
  ffn/sm90/table.cpp)
foreach(list LOCAS_CUDA_KERNELS LOCAS_CUDA_SM80 LOCAS_CUDA_SM90)
  list(TRANSFORM ${list} PREPEND "${CMAKE_CURRENT_LIST_DIR}/")
endforeach()
