// Images on the program's own stream, into its own device memory, for its own kernel, without a
// copy to the host or a wait in between: sample_cuda MODEL [STEPS]
//
//   nvcc sample_cuda.cu -o sample_cuda -I PREFIX/include -L PREFIX/lib -lddpm
//
// Prints each image's mean grey. No GPU has run it yet.
#include <cuda_runtime.h>
#include <ddpm.h>

#include <cstdio>
#include <cstdlib>

namespace {

constexpr int kImages = 16, kThreads = 256;

// mean[i]: of the values of image i, as bytes would have them.
__global__ void mean_grey(const float* images, size_t size, float* mean) {
  __shared__ float sums[kThreads];
  float sum = 0;
  for (size_t i = threadIdx.x; i < size; i += kThreads)
    sum += fminf(fmaxf((images[blockIdx.x * size + i] + 1.0f) * 127.5f, 0.0f), 255.0f);
  sums[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) mean[blockIdx.x] = sums[0] / static_cast<float>(size);
}

// Ends the program unless the call went well.
void check(ddpm_status status) {
  if (status == DDPM_OK) return;
  std::fprintf(stderr, "%s: %s\n", ddpm_status_string(status), ddpm_last_error());
  std::exit(status);
}
void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(DDPM_DEVICE);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: sample_cuda MODEL [STEPS]\n");
    return DDPM_USAGE;
  }
  ddpm_model_options options{};
  options.struct_size = sizeof options;
  options.device = "cuda";
  ddpm_model* model = nullptr;
  check(ddpm_model_load(argv[1], &options, &model));
  ddpm_sampler_options chain{};
  chain.struct_size = sizeof chain;
  chain.batch_size = kImages;
  chain.sampler = "ddim";
  chain.steps = argc > 2 ? std::atoi(argv[2]) : 0;
  ddpm_sampler* sampler = nullptr;
  check(ddpm_sampler_create(model, &chain, &sampler));
  ddpm_sampler_info info{};
  info.struct_size = sizeof info;
  check(ddpm_sampler_get_info(sampler, &info));

  cudaStream_t stream;
  float *images, *mean, on_host[kImages];
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  check(cudaMalloc(&images, kImages * info.image_size * sizeof(float)));
  check(cudaMalloc(&mean, sizeof on_host));

  // Both calls return at once; the stream keeps their order.
  check(ddpm_sample_device(sampler, 0, 0, kImages, images, stream));
  mean_grey<<<kImages, kThreads, 0, stream>>>(images, info.image_size, mean);
  check(cudaGetLastError());
  check(cudaMemcpyAsync(on_host, mean, sizeof on_host, cudaMemcpyDeviceToHost, stream));
  check(cudaStreamSynchronize(stream));
  check(ddpm_sampler_wait(sampler));  // tells whether all values were finite
  for (int i = 0; i < kImages; ++i) std::printf("image %d mean %.3f\n", i, on_host[i]);

  cudaFree(mean);
  cudaFree(images);
  cudaStreamDestroy(stream);
  ddpm_sampler_destroy(sampler);
  ddpm_model_destroy(model);
}
