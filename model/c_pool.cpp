// model/ddpm.h: pools and tickets.
#include <cmath>
#include <cstddef>
#include <limits>

#include "model/pool.h"

using namespace ddpm;
using namespace ddpm::c;

struct ddpm_pool {
  std::shared_ptr<Pool> pool;
};

struct ddpm_ticket {
  std::shared_ptr<Pool> pool;
  std::shared_ptr<Request> request;
};

namespace {

constexpr int kDefaultBatch = 8, kLargestBatch = 4096;
constexpr size_t kDefaultQueue = 1024;
constexpr double kLongestTimeout = 1e9;  // 32 years

// Throws for what cannot be asked of the pool.
void check(const ddpm_pool_request& q, const Pool& pool, size_t queue_size) {
  require(q.bytes != nullptr || q.floats != nullptr || q.n == 0,
          "request: bytes and floats are NULL");
  require(q.on_device == 0 || q.on_device == 1, "request: on_device must be 0 or 1");
  require(q.timeout >= 0 && q.timeout <= kLongestTimeout, "request: timeout must be 0 to 1e9");
  if (q.n > queue_size)
    fail(Status::kUsage, "request: n %zu is more than the pool's queue_size %zu", q.n, queue_size);
  check_images(pool.core(), q.first, q.n, q.labels);
}

std::shared_ptr<Request> make_request(const ddpm_pool_request& q, const Pool& pool,
                                      size_t image_size) {
  auto r = std::make_shared<Request>();
  r->rows = sampler_rows(pool.schedule(), pool.core().pipeline.scheduler,
                         chain_options(q.sampler, q.spacing, q.steps, q.eta));
  r->guidance = guidance_or(q.guidance, pool.guidance());
  r->seed = q.seed;
  r->first = q.first;
  r->n = q.n;
  if (q.seeds != nullptr) r->seeds.assign(q.seeds, q.seeds + q.n);
  if (q.labels != nullptr) r->labels.assign(q.labels, q.labels + q.n);
  if (q.x_T != nullptr) r->x_T.assign(q.x_T, q.x_T + q.n * image_size);
  r->bytes = q.bytes;
  r->floats = q.floats;
  r->on_device = q.on_device != 0;
  if (q.timeout > 0)
    r->deadline = Request::Clock::now() + std::chrono::duration_cast<Request::Clock::duration>(
                                              std::chrono::duration<double>(q.timeout));
  r->done = q.done;
  r->user = q.user;
  return r;
}

}  // namespace

ddpm_status ddpm_pool_create(ddpm_model* model, const ddpm_pool_options* options,
                             ddpm_pool** pool) {
  return guarded(nullptr, [&] {
    require(model != nullptr, "model is NULL");
    require(pool != nullptr, "pool is NULL");
    const ddpm_pool_options o = options_of(options, offsetof(ddpm_pool_options, guidance));
    require(o.batch_size >= 0 && o.batch_size <= kLargestBatch,
            "options: batch_size must be 0 to 4096");
    const int batch = o.batch_size == 0 ? kDefaultBatch : o.batch_size;
    require(model->core->timesteps() <= std::numeric_limits<int32_t>::max() / batch,
            "options: batch_size is too large for the model's timesteps");
    auto made = std::make_unique<ddpm_pool>();
    made->pool =
        std::make_shared<Pool>(model->core, batch, o.queue_size == 0 ? kDefaultQueue : o.queue_size,
                               usual_guidance(*model->core, o.guidance));
    *pool = made.release();
  });
}

void ddpm_pool_destroy(ddpm_pool* pool) {
  if (pool == nullptr || pool->pool->in_callback()) return;
  const std::unique_ptr<ddpm_pool> owned(pool);
  pool->pool->stop();
}

ddpm_status ddpm_pool_submit(ddpm_pool* pool, const ddpm_pool_request* request,
                             ddpm_ticket** ticket) {
  return guarded(nullptr, [&] {
    require(pool != nullptr, "pool is NULL");
    require(request != nullptr, "request is NULL");
    const ddpm_pool_request q = options_of(request, offsetof(ddpm_pool_request, guidance));
    require(ticket != nullptr || q.done != nullptr, "ticket and request's done are NULL");
    const ddpm_pool_info info = pool->pool->info();
    check(q, *pool->pool, info.queue_size);
    std::unique_ptr<ddpm_ticket> made(
        new ddpm_ticket{pool->pool, make_request(q, *pool->pool, info.image_size)});
    pool->pool->submit(std::shared_ptr<Request>(made->request), [&] {
      if (ticket != nullptr) *ticket = made.release();
    });
  });
}

ddpm_status ddpm_ticket_wait(ddpm_ticket* ticket) {
  const ddpm_status status = guarded(nullptr, [&] {
    require(ticket != nullptr, "ticket is NULL");
    ticket->pool->wait(*ticket->request);
  });
  if (status != DDPM_OK) return status;
  const Request& r = *ticket->request;
  return r.status == DDPM_OK ? DDPM_OK
                             : failed(static_cast<Status>(r.status), r.error.text, nullptr);
}

int ddpm_ticket_done(const ddpm_ticket* ticket) {
  return ticket != nullptr && ticket->pool->ended(*ticket->request) ? 1 : 0;
}

void ddpm_ticket_cancel(ddpm_ticket* ticket) {
  if (ticket != nullptr) ticket->request->cancelled = true;
}

void ddpm_ticket_destroy(ddpm_ticket* ticket) {
  if (ticket == nullptr) return;
  const std::unique_ptr<ddpm_ticket> owned(ticket);
  ticket->request->cancelled = true;
  if (!ticket->pool->in_callback())
    (void)guarded(nullptr, [&] { ticket->pool->wait(*ticket->request); });
}

ddpm_status ddpm_pool_drain(ddpm_pool* pool) {
  return guarded(nullptr, [&] {
    require(pool != nullptr, "pool is NULL");
    pool->pool->drain();
  });
}

ddpm_status ddpm_pool_get_info(ddpm_pool* pool, ddpm_pool_info* info) {
  return guarded(nullptr, [&] {
    require(pool != nullptr, "pool is NULL");
    require(info != nullptr, "info is NULL");
    require(info->struct_size == sizeof *info, "info: struct_size is not this library's");
    *info = pool->pool->info();
  });
}
