/** @file
 * The C entry of ddpm: load a model, sample from it; run its network, train it.
 *
 * A model never changes and any number of threads may share it. A sampler makes images; give each
 * thread one of its own. They run side by side, each with its own stream on a GPU. A session runs
 * the network or trains it step by step; the sessions of a model take turns. A pool makes the
 * images that many threads ask for, all in one batch.
 *
 * Images are (N, H, W, C), densely packed: C varies fastest. That is what a PyTorch tensor
 * (N, C, H, W) holds in channels_last memory; for one channel any layout is it. As floats they lie
 * in [-1, 1]; as bytes they are floor(clamp((x + 1) 127.5, 0, 255) + 0.5). Image k of a seed is a
 * function of the weights, the seed and k alone: not of its neighbours, its place in a batch, or
 * the thread. A timestep is an int32 from 0, the least noisy, to timesteps - 1.
 *
 * Options. A struct's first field is its size, sizeof(struct), set by the caller; a field that is 0
 * or NULL means the default, and NULL for a whole options struct means all defaults. A later
 * version adds fields at the end only, and takes the smaller struct of an older header.
 *
 * Memory. Pointers are host memory unless said otherwise. A device pointer is an address on the
 * model's device: CUDA device memory for "cuda", host memory for "cpu". All stay the caller's, and
 * nothing keeps them but a pool its requests' results. A sampler, session or pool allocates all its
 * tensors when it is made, none later.
 *
 * Streams. `stream` is a cudaStream_t. The work waits for what the stream holds at the call, and
 * the stream waits for the work. NULL stands for no stream: inputs must be ready, and the call
 * returns when its outputs are. So CUDA's legacy default stream, which is 0, is passed as
 * cudaStreamLegacy, (void*)1. A stream that is being captured is refused. On the CPU `stream` is
 * NULL. The caller's current device is put back by every function that takes a handle.
 *
 * Lifetime. Samplers, sessions and pools keep their model alive, tickets what they need of their
 * pool: destroy in any order. A handle must not be in use while it is destroyed, nor used
 * afterwards. Destroying NULL does nothing.
 *
 * Errors. Every call returns a status, which is also the exit code of the program for that kind of
 * failure. Bad arguments are refused before anything is done; where a handle was to be made, none
 * is, and *out is untouched; after any other failure the contents of other outputs are undefined
 * and the handle can be used again. No exception leaves, nothing aborts, nothing is printed, and
 * nothing is kept outside the handles but the text of ddpm_last_error().
 */
#ifndef DDPM_H_
#define DDPM_H_

#include <stddef.h>
#include <stdint.h>

/** On every function of the library. */
#if defined(__GNUC__)
#define DDPM_API __attribute__((visibility("default")))
#else
#define DDPM_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/** The header's version, by the rules of semantic versioning. */
#define DDPM_VERSION "0.1.0"
/** The loaded library's, which may be newer than the header's. */
DDPM_API const char* ddpm_version(void);

/** What a call came to. */
typedef enum ddpm_status {
  DDPM_OK = 0,        /**< done */
  DDPM_USAGE = 2,     /**< an argument */
  DDPM_CONFIG = 3,    /**< a missing or unusable model or setting */
  DDPM_FILE = 4,      /**< an unreadable or damaged file, or one that cannot be written */
  DDPM_MEMORY = 5,    /**< host or device memory */
  DDPM_DEVICE = 6,    /**< no device or driver, or a failure of it */
  DDPM_NONFINITE = 7, /**< values that are not finite */
  DDPM_PEER = 8,      /**< another process of the run was lost; not returned yet */
  DDPM_FULL = 9,      /**< a pool's queue has no room now: try again later */
  DDPM_TIMEOUT = 10,  /**< a request's deadline passed */
  DDPM_BUG = 70,      /**< a broken invariant of this library */
  DDPM_STOPPED = 75   /**< stopped by ddpm_cancel or by a callback */
} ddpm_status;

/** A few words for a status, also for one that this library does not know. */
DDPM_API const char* ddpm_status_string(ddpm_status status);

/** Weights and configuration; for any number of threads. */
typedef struct ddpm_model ddpm_model;
/** Makes images; for one thread at a time. */
typedef struct ddpm_sampler ddpm_sampler;
/** Runs or trains the network; for one thread at a time. */
typedef struct ddpm_session ddpm_session;
/** Makes the images that many threads ask for; for any number of threads. */
typedef struct ddpm_pool ddpm_pool;
/** A request of a pool; for any number of threads. */
typedef struct ddpm_ticket ddpm_ticket;

/** Why this thread's last failed call failed, "" before the first; valid until its next one. */
DDPM_API const char* ddpm_last_error(void);
/** The same for a handle's last failed call, on whatever thread; "" for NULL. Models, pools and
 * tickets are shared and keep no text. */
DDPM_API const char* ddpm_sampler_last_error(const ddpm_sampler* sampler);
/** As ddpm_sampler_last_error(). */
DDPM_API const char* ddpm_session_last_error(const ddpm_session* session);

/* ---- models ---- */

/** A line about what was chosen; called on the thread that makes a model or sampler. */
typedef void (*ddpm_log_callback)(void* user, const char* line);

/** Memory of the model's device (the host's for a CPU), aligned to 256; NULL: none is left. On a
 * GPU the device is current. Called where samplers, sessions and pools are made, never while they
 * run; by several threads at once if those are made so. */
typedef void* (*ddpm_allocate_callback)(void* user, size_t bytes);
/** Takes back what ddpm_allocate_callback gave, of the same size. */
typedef void (*ddpm_release_callback)(void* user, void* memory, size_t bytes);

/** How to load a model. */
typedef struct ddpm_model_options {
  uint32_t struct_size;    /**< sizeof(ddpm_model_options) */
  int32_t threads;         /**< of the CPU, for each sampler and the sessions together; 0: all */
  const char* device;      /**< "auto", "cpu", "cuda" or "cuda:I"; NULL: "auto" */
  const char* precision;   /**< "auto", "fp32", "tf32" or "bf16"; NULL: "auto" */
  int32_t batch_invariant; /**< 1: the batch size does not change an image's bits either; slower */
  ddpm_log_callback log;   /**< NULL: none */
  void* user;              /**< for log, allocate and release */
  ddpm_allocate_callback allocate; /**< for weights and activations; NULL: the system */
  ddpm_release_callback release;   /**< present where allocate is */
} ddpm_model_options;

/** Loads what `ddpm sample --model` takes: a pipeline folder of diffusers, a folder with
 * config.json and weights, or a run folder (its last checkpoint). The weights file stays open, and
 * is read when a sampler or session is made. */
DDPM_API ddpm_status ddpm_model_load(const char* folder, const ddpm_model_options* options,
                                     ddpm_model** model);

/** A model's files in memory. */
typedef struct ddpm_model_files {
  uint32_t struct_size;    /**< sizeof(ddpm_model_files) */
  const char* unet_config; /**< the text of unet/config.json */
  const char*
      scheduler_config; /**< of scheduler/scheduler_config.json; NULL: diffusers' defaults */
  const void* weights;  /**< the bytes of diffusion_pytorch_model.safetensors; copied */
  size_t weights_size;  /**< bytes of weights */
} ddpm_model_files;
/** The same from memory. */
DDPM_API ddpm_status ddpm_model_load_memory(const ddpm_model_files* files,
                                            const ddpm_model_options* options, ddpm_model** model);
/** Samplers, sessions and pools of it live on. */
DDPM_API void ddpm_model_destroy(ddpm_model* model);

/** What a model is. */
typedef struct ddpm_info {
  uint32_t struct_size;    /**< sizeof(ddpm_info) */
  int32_t height;          /**< H */
  int32_t width;           /**< W */
  int32_t channels;        /**< C */
  int32_t output_channels; /**< of the network */
  int32_t timesteps;       /**< T */
  int32_t classes;         /**< 0: not class-conditional */
  int64_t parameters;      /**< weights of the network */
  int64_t multiply_adds;   /**< of the network's forward pass, per image */
  int32_t null_label;      /**< the label of no class, which is `classes`: the model can be guided;
                              -1: none */
} ddpm_info;
/** Fills *info, whose struct_size is set. */
DDPM_API ddpm_status ddpm_get_info(ddpm_model* model, ddpm_info* info);

/* ---- samplers: whole images ---- */

/** After each of a chain's steps (on a GPU: now and then). Images done before this chain, images of
 * this chain; steps done and all steps of the chain. 0: go on; else the call ends with
 * DDPM_STOPPED. */
typedef int (*ddpm_progress_callback)(void* user, size_t images_done, size_t images, int32_t step,
                                      int32_t steps);
/** The images that the network sees in the noise now, equation (15) of the paper, clipped where the
 * sampler clips: x0 (images, H, W, C), valid during the call. As above otherwise. */
typedef int (*ddpm_preview_callback)(void* user, size_t images_done, size_t images, int32_t step,
                                     int32_t steps, const float* x0);

/** How to make images. */
typedef struct ddpm_sampler_options {
  uint32_t struct_size; /**< sizeof(ddpm_sampler_options) */
  int32_t batch_size;   /**< images that run together, at most 65536; 0: 8 */
  const char* sampler;  /**< "ddpm" (Algorithm 2 of the paper), "ddim" or "dpmpp2m"; NULL: "ddpm" */
  const char* spacing;  /**< "leading", "trailing" or "linspace"; NULL: the sampler's own */
  double eta;           /**< 0 to 1, ddim's share of ddpm's noise */
  int32_t steps;        /**< of a chain; 0: ddpm 1000, ddim 50, dpmpp2m 20 */
  int32_t preview_every;           /**< steps from one preview to the next; 0: 1 */
  ddpm_progress_callback progress; /**< NULL: none */
  ddpm_preview_callback preview;   /**< NULL: none */
  void* user;                      /**< for both */
  /** 0: not guided. Else, for models with a null_label, classifier-free guidance (Ho & Salimans
   * 2022): each step runs the network on every image with its label and with none, 2 batch_size
   * images, and goes by none + guidance (label - none). 1: as learned; more leans on the class; at
   * most 1000. A task may give another; for no class at all give the null_label. */
  double guidance;
} ddpm_sampler_options;

/** Makes a sampler, with its own copy of the weights. */
DDPM_API ddpm_status ddpm_sampler_create(ddpm_model* model, const ddpm_sampler_options* options,
                                         ddpm_sampler** sampler);
/** Waits for the sampler's work. */
DDPM_API void ddpm_sampler_destroy(ddpm_sampler* sampler);

/** What a sampler is. */
typedef struct ddpm_sampler_info {
  uint32_t struct_size; /**< sizeof(ddpm_sampler_info) */
  int32_t batch_size;   /**< images that run together */
  int32_t steps;        /**< of a chain */
  size_t image_size;    /**< values of an image: height * width * channels */
  size_t device_bytes;  /**< that the sampler holds: weights, activations, workspace */
} ddpm_sampler_info;
/** Fills *info, whose struct_size is set. */
DDPM_API ddpm_status ddpm_sampler_get_info(ddpm_sampler* sampler, ddpm_sampler_info* info);

/** Images first, ..., first + n - 1 of `seed`. nhwc: n * image_size values. A class-conditional
 * model draws class (image number mod classes). DDPM_NONFINITE rather than images that are not
 * finite. */
DDPM_API ddpm_status ddpm_sample(ddpm_sampler* sampler, uint64_t seed, uint64_t first, size_t n,
                                 uint8_t* nhwc);
/** As ddpm_sample(), in [-1, 1]. */
DDPM_API ddpm_status ddpm_sample_float(ddpm_sampler* sampler, uint64_t seed, uint64_t first,
                                       size_t n, float* nhwc);
/** As ddpm_sample_float(), into a device pointer. Values are not clamped to [-1, 1], which dpmpp2m
 * may leave. With a stream, the call returns before the images are there, callbacks are not called,
 * and what was not finite in the last batch is told by ddpm_sampler_wait. */
DDPM_API ddpm_status ddpm_sample_device(ddpm_sampler* sampler, uint64_t seed, uint64_t first,
                                        size_t n, float* nhwc, void* stream);

/** What to make, from what, and where to. */
typedef struct ddpm_sample_task {
  uint32_t struct_size;  /**< sizeof(ddpm_sample_task) */
  int32_t on_device;     /**< 1: x_T, bytes, floats are device pointers; floats is not clamped */
  uint64_t seed;         /**< of all images, unless seeds is given */
  uint64_t first;        /**< number of image 0 */
  size_t n;              /**< images */
  const int32_t* labels; /**< (n), in host memory, 0 to classes - 1 or the null_label; NULL: number
                            mod classes */
  const float* x_T;      /**< (n, H, W, C), where the chains start; NULL: drawn from the seed */
  uint8_t* bytes;        /**< (n, H, W, C) or NULL */
  float* floats;         /**< (n, H, W, C) or NULL; not both NULL */
  void* stream;          /**< only with on_device */
  /** (n), in host memory: image i is image `first` of seeds[i]. NULL: image first + i of seed. */
  const uint64_t* seeds;
  double guidance; /**< of all images; 0: the sampler's. Not 1 only where the sampler is guided. */
} ddpm_sample_task;
/** All of the above by one struct. */
DDPM_API ddpm_status ddpm_sample_run(ddpm_sampler* sampler, const ddpm_sample_task* task);

/** Waits for the work on a stream. */
DDPM_API ddpm_status ddpm_sampler_wait(ddpm_sampler* sampler);
/** From any thread, while the sampler lives: the running call, or the next one if none runs, ends
 * after its current step with DDPM_STOPPED. */
DDPM_API void ddpm_cancel(ddpm_sampler* sampler);

/* ---- pools: the requests of many threads in one batch ---- */

/* A pool has a thread of its own, which steps a batch of images. Before each step images join where
 * others have ended, each with a sampler, steps and seed of its own. Requests that wait get a place
 * in turn, one image each, so that a large one does not hold the others up. With the model's
 * batch_invariant an image has the same bits as from a ddpm_sampler; on the CPU also without it,
 * from one of the pool's batch_size. Every function of a pool is for any thread. */

/** How many images a pool runs and keeps waiting. */
typedef struct ddpm_pool_options {
  uint32_t struct_size; /**< sizeof(ddpm_pool_options) */
  int32_t batch_size;   /**< images that run together, at most 4096; 0: 8 */
  size_t queue_size;    /**< images that may wait for a place; 0: 1024 */
  double guidance;      /**< as in ddpm_sampler_options, of requests that give none */
} ddpm_pool_options;

/** Makes a pool, with its own copy of the weights, and starts its thread. */
DDPM_API ddpm_status ddpm_pool_create(ddpm_model* model, const ddpm_pool_options* options,
                                      ddpm_pool** pool);
/** Ends every request with DDPM_STOPPED after the current step, and returns when the last callback
 * has. Not for callbacks. */
DDPM_API void ddpm_pool_destroy(ddpm_pool* pool);

/** A request has ended; `error` says why it failed, "" for DDPM_OK. On the pool's thread, which
 * waits meanwhile. It may submit, cancel and destroy requests, but not wait for them. */
typedef void (*ddpm_done_callback)(void* user, ddpm_status status, const char* error);

/** What to make, from what, where to, and until when. */
typedef struct ddpm_pool_request {
  uint32_t struct_size;    /**< sizeof(ddpm_pool_request) */
  int32_t steps;           /**< as in ddpm_sampler_options */
  const char* sampler;     /**< as in ddpm_sampler_options */
  const char* spacing;     /**< as in ddpm_sampler_options */
  double eta;              /**< as in ddpm_sampler_options */
  uint64_t seed;           /**< as in ddpm_sample_task */
  uint64_t first;          /**< as in ddpm_sample_task */
  size_t n;                /**< images, at most the pool's queue_size */
  const uint64_t* seeds;   /**< as in ddpm_sample_task; copied */
  const int32_t* labels;   /**< as in ddpm_sample_task; copied */
  const float* x_T;        /**< as in ddpm_sample_task, in host memory; copied */
  uint8_t* bytes;          /**< (n, H, W, C) or NULL; the pool's until the request has ended */
  float* floats;           /**< the same, clamped to [-1, 1]; not both NULL */
  double timeout;          /**< seconds from now until it ends with DDPM_TIMEOUT; 0: none */
  ddpm_done_callback done; /**< NULL: none */
  void* user;              /**< for done */
  double guidance;         /**< as in ddpm_sample_task; 0: the pool's */
  /** 1: bytes and floats are device pointers, and floats is not clamped. What else uses them must
   * have done so when the request is submitted; the images are there when it ends. */
  int32_t on_device;
} ddpm_pool_request;

/** Returns at once. DDPM_FULL: the queue has no room for n images now; nothing was done, and `done`
 * is not called, as for every failure of this call. ticket: NULL where `done` is given and nobody
 * will wait or cancel. `done` may run before this returns. */
DDPM_API ddpm_status ddpm_pool_submit(ddpm_pool* pool, const ddpm_pool_request* request,
                                      ddpm_ticket** ticket);
/** Waits until the request has ended and `done` has returned, and returns its status: DDPM_OK,
 * DDPM_STOPPED, DDPM_TIMEOUT, DDPM_NONFINITE, or what a step failed with. Any number of times. */
DDPM_API ddpm_status ddpm_ticket_wait(ddpm_ticket* ticket);
/** 1: ddpm_ticket_wait would return at once; 0: not, or NULL. */
DDPM_API int ddpm_ticket_done(const ddpm_ticket* ticket);
/** The request ends with DDPM_STOPPED before its next step, unless it has ended by then. */
DDPM_API void ddpm_ticket_cancel(ddpm_ticket* ticket);
/** Cancels the request and waits for its end; in a callback it does not wait. */
DDPM_API void ddpm_ticket_destroy(ddpm_ticket* ticket);

/** Takes no more requests (DDPM_STOPPED), and returns when all have ended. */
DDPM_API ddpm_status ddpm_pool_drain(ddpm_pool* pool);

/** What a pool is, and what it does now. */
typedef struct ddpm_pool_info {
  uint32_t struct_size; /**< sizeof(ddpm_pool_info) */
  int32_t batch_size;   /**< images that run together */
  size_t queue_size;    /**< images that may wait for a place */
  size_t running;       /**< images that have a place */
  size_t waiting;       /**< images that wait for one */
  uint64_t images;      /**< finished so far */
  uint64_t steps;       /**< made so far */
  size_t image_size;    /**< values of an image: height * width * channels */
  size_t device_bytes;  /**< that the pool holds: weights, activations, workspace */
} ddpm_pool_info;
/** Fills *info, whose struct_size is set. */
DDPM_API ddpm_status ddpm_pool_get_info(ddpm_pool* pool, ddpm_pool_info* info);

/* ---- sessions: one kind of work on a batch of a fixed size, with its own copy of the weights ----
 */

/** Waits for the session's work. */
DDPM_API void ddpm_session_destroy(ddpm_session* session);
/** Bytes of the device that the session holds: weights, activations, data set, workspace. */
DDPM_API ddpm_status ddpm_session_bytes(ddpm_session* session, size_t* bytes);
/** Waits for the session's work. DDPM_NONFINITE if training or sampling met a value that is not
 * finite: from there on training has changed nothing, and sampled images are worthless. */
DDPM_API ddpm_status ddpm_wait(ddpm_session* session);

/* ---- the network ---- */

/** A session that runs the network on batches of batch_size images. */
DDPM_API ddpm_status ddpm_forward_open(ddpm_model* model, int batch_size, ddpm_session** session);
/** output (N, H, W, output_channels) = network(sample (N, H, W, channels), timestep (N)). labels
 * (N), 0 to classes - 1 or the null_label, are NULL where the model has no classes. The CPU refuses
 * timesteps and labels out of range; on a GPU an image that has one is undefined. */
DDPM_API ddpm_status ddpm_forward(ddpm_session* session, const float* sample,
                                  const int32_t* timestep, const int32_t* labels, float* output,
                                  void* stream);

/* ---- training ---- */

/** How to train. */
typedef struct ddpm_train_options {
  uint32_t struct_size; /**< sizeof(ddpm_train_options) */
  int32_t batch_size;   /**< at least 1; larger than the data set is allowed */
  int32_t flip;         /**< 1: flip each image horizontally with probability 1/2 */
  float learning_rate;  /**< of Adam */
  int64_t warmup_steps; /**< the rate of update n is learning_rate * min(n / warmup_steps, 1) */
  float grad_clip;      /**< the gradient's largest norm, 0: not clipped */
  double ema_decay;     /**< of the averaged weights */
  uint64_t seed;        /**< of the order of images, t, noise, flips and dropout */
} ddpm_train_options;

/** Trains from the folder's weights, with fresh moments and the dropout of its config, by
 * train.loss simple, of a learned variance kl, of a learned_range hybrid. images:
 * uint8 (count, H, W, channels) in host memory, copied to the device here; so are labels (count),
 * NULL where the model has no classes. */
DDPM_API ddpm_status ddpm_train_open(ddpm_model* model, const ddpm_train_options* options,
                                     const uint8_t* images, const int32_t* labels, int64_t count,
                                     ddpm_session** session);
/** `steps` whole updates: gather and flip images, draw t and noise, forward, loss, backward, clip,
 * Adam, EMA. */
DDPM_API ddpm_status ddpm_train_steps(ddpm_session* session, int steps, void* stream);

/** How far training is. */
typedef struct ddpm_train_state {
  uint32_t struct_size; /**< sizeof(ddpm_train_state) */
  uint32_t nonfinite;   /**< not 0: updates have stopped at a value that is not finite */
  uint64_t step;        /**< updates made */
  double loss_sum;      /**< over all updates */
  float loss;           /**< of the last update */
  float grad_norm;      /**< of the last, before clipping */
  float learning_rate;  /**< of the last */
} ddpm_train_state;
/** Waits for the session's work. */
DDPM_API ddpm_status ddpm_train_get_state(ddpm_session* session, ddpm_train_state* state);
/** Writes a checkpoint folder as `ddpm train` does, which ddpm_model_load and diffusers read. */
DDPM_API ddpm_status ddpm_train_save(ddpm_session* session, const char* folder);

/* ---- sampling step by step ---- */

/** sampler: "ddpm", "ddim" or "dpmpp2m"; steps: of a chain, 0 = its default; eta: ddim's. */
DDPM_API ddpm_status ddpm_sample_open(ddpm_model* model, int batch_size, const char* sampler,
                                      int steps, double eta, ddpm_session** session);
/** Steps of a whole chain. */
DDPM_API ddpm_status ddpm_sample_chain(ddpm_session* session, int* steps);
/** Begins a chain: images first_image, first_image + 1, ... of `seed`. Where x (N, H, W, channels)
 * is given, it is set to their noise; to start from other values pass those to the next call. A
 * class-conditional model draws class (image number mod classes). */
DDPM_API ddpm_status ddpm_sample_start(ddpm_session* session, uint64_t seed, uint64_t first_image,
                                       float* x, void* stream);
/** The next `steps` denoising steps of the chain, on x in place; NULL: on the session's own x,
 * which holds what the last call left. After the last step x are the images, not clamped to [-1,
 * 1]. */
DDPM_API ddpm_status ddpm_sample_steps(ddpm_session* session, int steps, float* x, void* stream);

#ifdef __cplusplus
}
#endif

#endif /* DDPM_H_ */
