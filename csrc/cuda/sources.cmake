# The files that hold CUDA kernels, for both builds: nvcc's for the GPU, and the SIMT runner's for the CPU.
set(LOCAS_CUDA_KERNELS
  elementwise/glu_activation.cu
  elementwise/norms.cu
  elementwise/rotary.cu
  elementwise/token_nll.cu
  ffn/sm80/backward.cu
  ffn/sm80/decode.cu
  ffn/sm80/forward.cu
  slots/update.cu
  slots/update_from_factors.cu
  slots/write_slots.cu)
list(TRANSFORM LOCAS_CUDA_KERNELS PREPEND "${CMAKE_CURRENT_LIST_DIR}/")

# Those of Hopper alone: sm_90a.
set(LOCAS_CUDA_SM90_KERNELS
  ffn/sm90/forward.cu)
list(TRANSFORM LOCAS_CUDA_SM90_KERNELS PREPEND "${CMAKE_CURRENT_LIST_DIR}/")
