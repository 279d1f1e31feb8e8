/* The C entry of ddpm: open a model folder, run its network, train it, sample from it.
 *
 * Images and network outputs are fp32, (N, H, W, C) densely packed: C varies fastest. That is what
 * a PyTorch tensor (N, C, H, W) holds in channels_last memory; for one channel any layout is it.
 * Images lie in [-1, 1]. Timesteps are int32, 0 to timesteps - 1; 0 is the least noisy.
 *
 * Memory. Tensor pointers are addresses on the model's device: CUDA device memory for "cuda", host
 * memory for "cpu". They stay the caller's, are read and written in the order of the stream, and
 * nothing keeps them. A session allocates all it needs when it is opened, and nothing after that.
 *
 * Streams. `stream` is a cudaStream_t. The work waits for what the stream holds at the call, and
 * the stream waits for the work: it is as if the work ran on the stream, and the call returns at
 * once. NULL stands for no stream: inputs must be ready, and the call returns when its outputs are.
 * So CUDA's legacy default stream, which is 0, is passed as cudaStreamLegacy, (void*)1. A stream
 * that is being captured is refused by CUDA. On the CPU `stream` is NULL. The caller's current
 * device is put back by every function but ddpm_open and ddpm_close.
 *
 * Threads. Any thread may call; calls on a model and its sessions take turns. A handle must not be
 * in use while it is closed. Sessions keep their model alive: close in any order.
 *
 * Errors. Every call returns a status, which is also the exit code of the program for that kind of
 * failure; the text is ddpm_last_error(). Bad arguments are refused before anything is done; after
 * any other failure the contents of outputs are undefined. No exception leaves, nothing aborts,
 * nothing is printed.
 */
#ifndef DDPM_H_
#define DDPM_H_

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define DDPM_API __attribute__((visibility("default")))
#else
#define DDPM_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum ddpm_status {
  DDPM_OK = 0,
  DDPM_USAGE = 2,     /* an argument */
  DDPM_CONFIG = 3,    /* a missing or unusable model or setting */
  DDPM_FILE = 4,      /* an unreadable or damaged file, or one that cannot be written */
  DDPM_MEMORY = 5,    /* host or device memory */
  DDPM_DEVICE = 6,    /* no device or driver, or a failure of it */
  DDPM_NONFINITE = 7, /* values that are not finite */
  DDPM_PEER = 8,      /* another process of the run was lost; not returned yet */
  DDPM_BUG = 70,      /* a broken invariant of this library */
  DDPM_STOPPED = 75   /* stopped by a signal; not returned by this library */
} ddpm_status;

typedef struct ddpm_model ddpm_model;
typedef struct ddpm_session ddpm_session;

/* Why this thread's last failed call failed, "" before the first; valid until its next one. */
DDPM_API const char* ddpm_last_error(void);

/* ---- models ---- */

/* Opens what `ddpm sample --model` takes. device: "auto", "cpu", "cuda" or "cuda:I"; precision:
 * "auto", "fp32", "tf32" or "bf16"; NULL means "auto". threads: of the CPU, 0 = all. Weights are
 * read when a session is opened. */
DDPM_API ddpm_status ddpm_open(const char* folder, const char* device, const char* precision,
                               int threads, ddpm_model** model);
DDPM_API void ddpm_close(ddpm_model* model); /* NULL is ignored */

typedef struct ddpm_info {
  uint32_t struct_size; /* set by the caller: sizeof(ddpm_info) */
  int32_t height, width, channels;
  int32_t output_channels;
  int32_t timesteps;
  int32_t classes;       /* 0: not class-conditional */
  int64_t parameters;    /* weights of the network */
  int64_t multiply_adds; /* of the network's forward pass, per image */
} ddpm_info;
DDPM_API ddpm_status ddpm_get_info(ddpm_model* model, ddpm_info* info);

/* ---- sessions: one kind of work on a batch of a fixed size, with its own copy of the weights ----
 */

DDPM_API void ddpm_session_close(ddpm_session* session); /* waits for its work; NULL is ignored */
/* Bytes of the device that the session holds: weights, activations, data set, workspace. */
DDPM_API ddpm_status ddpm_session_bytes(ddpm_session* session, size_t* bytes);
/* Waits for the session's work. DDPM_NONFINITE if training or sampling met a value that is not
 * finite: from there on training has changed nothing, and sampled images are worthless. */
DDPM_API ddpm_status ddpm_wait(ddpm_session* session);

/* ---- the network ---- */

DDPM_API ddpm_status ddpm_forward_open(ddpm_model* model, int batch_size, ddpm_session** session);
/* output (N, H, W, output_channels) = network(sample (N, H, W, channels), timestep (N)). labels
 * (N), 0 to classes - 1, are NULL where the model has no classes. The CPU refuses timesteps and
 * labels out of range; on a GPU an image that has one is undefined. */
DDPM_API ddpm_status ddpm_forward(ddpm_session* session, const float* sample,
                                  const int32_t* timestep, const int32_t* labels, float* output,
                                  void* stream);

/* ---- training ---- */

typedef struct ddpm_train_options {
  uint32_t struct_size; /* set by the caller: sizeof(ddpm_train_options) */
  int32_t batch_size;   /* at least 1; larger than the data set is allowed */
  int32_t flip;         /* 1: flip each image horizontally with probability 1/2 */
  float learning_rate;  /* of Adam */
  int64_t warmup_steps; /* the rate of update n is learning_rate * min(n / warmup_steps, 1) */
  float grad_clip;      /* the gradient's largest norm, 0: not clipped */
  double ema_decay;     /* of the averaged weights */
  uint64_t seed;
} ddpm_train_options;

/* Trains from the folder's weights, with fresh moments and the dropout of its config. images: uint8
 * (count, H, W, channels) in host memory, copied to the device here; so are labels (count), NULL
 * where the model has no classes. */
DDPM_API ddpm_status ddpm_train_open(ddpm_model* model, const ddpm_train_options* options,
                                     const uint8_t* images, const int32_t* labels, int64_t count,
                                     ddpm_session** session);
/* `steps` whole updates: gather and flip images, draw t and noise, forward, loss, backward, clip,
 * Adam, EMA. */
DDPM_API ddpm_status ddpm_train_steps(ddpm_session* session, int steps, void* stream);

typedef struct ddpm_train_state {
  uint32_t struct_size; /* set by the caller: sizeof(ddpm_train_state) */
  uint32_t nonfinite;   /* not 0: updates have stopped at a value that is not finite */
  uint64_t step;        /* updates made */
  double loss_sum;      /* over all updates */
  float loss, grad_norm, learning_rate; /* of the last; grad_norm before clipping */
} ddpm_train_state;
/* Waits for the session's work. */
DDPM_API ddpm_status ddpm_train_get_state(ddpm_session* session, ddpm_train_state* state);
/* Writes a checkpoint folder as `ddpm train` does, which ddpm_open and diffusers read. */
DDPM_API ddpm_status ddpm_train_save(ddpm_session* session, const char* folder);

/* ---- sampling ---- */

/* sampler: "ddpm", "ddim" or "dpmpp2m"; steps: of a chain, 0 = its default; eta: ddim's. */
DDPM_API ddpm_status ddpm_sample_open(ddpm_model* model, int batch_size, const char* sampler,
                                      int steps, double eta, ddpm_session** session);
/* Steps of a whole chain. */
DDPM_API ddpm_status ddpm_sample_chain(ddpm_session* session, int* steps);
/* Begins a chain: images first_image, first_image + 1, ... of `seed`. Where x (N, H, W, channels)
 * is given, it is set to their noise; to start from other values pass those to the next call. A
 * class-conditional model draws class (image number mod classes). */
DDPM_API ddpm_status ddpm_sample_start(ddpm_session* session, uint64_t seed, uint64_t first_image,
                                       float* x, void* stream);
/* The next `steps` denoising steps of the chain, on x in place; NULL: on the session's own x, which
 * holds what the last call left. After the last step x are the images, not clamped to [-1, 1]. */
DDPM_API ddpm_status ddpm_sample_steps(ddpm_session* session, int steps, float* x, void* stream);

#ifdef __cplusplus
}
#endif

#endif /* DDPM_H_ */
