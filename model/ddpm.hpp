// ddpm.h for C++11 and later: handles that destroy themselves, failures as exceptions.
#ifndef DDPM_HPP_
#define DDPM_HPP_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "ddpm.h"

namespace ddpm {
namespace api {

class Error : public std::runtime_error {
 public:
  Error(ddpm_status status, const std::string& text) : std::runtime_error(text), status_(status) {}
  ddpm_status status() const { return status_; }

 private:
  ddpm_status status_;
};

// Throws Error unless the call that returned `status` went well.
inline void check(ddpm_status status) {
  if (status != DDPM_OK) throw Error(status, ddpm_last_error());
}

// A struct of ddpm.h whose size is set and whose other fields are defaults.
template <typename Struct>
Struct sized() {
  Struct s{};
  s.struct_size = sizeof(Struct);
  return s;
}

// Never changes; threads may share it.
class Model {
 public:
  explicit Model(const std::string& folder,
                 const ddpm_model_options& options = sized<ddpm_model_options>()) {
    ddpm_model* model = nullptr;
    check(ddpm_model_load(folder.c_str(), &options, &model));
    model_.reset(model);
  }
  explicit Model(const ddpm_model_files& files,
                 const ddpm_model_options& options = sized<ddpm_model_options>()) {
    ddpm_model* model = nullptr;
    check(ddpm_model_load_memory(&files, &options, &model));
    model_.reset(model);
  }

  ddpm_model* get() const { return model_.get(); }
  ddpm_info info() const {
    ddpm_info info = sized<ddpm_info>();
    check(ddpm_get_info(get(), &info));
    return info;
  }

 private:
  struct Destroy {
    void operator()(ddpm_model* m) const { ddpm_model_destroy(m); }
  };
  std::unique_ptr<ddpm_model, Destroy> model_;
};

// For one thread at a time; cancel() is for any.
class Sampler {
 public:
  explicit Sampler(const Model& model,
                   const ddpm_sampler_options& options = sized<ddpm_sampler_options>()) {
    ddpm_sampler* sampler = nullptr;
    check(ddpm_sampler_create(model.get(), &options, &sampler));
    sampler_.reset(sampler);
  }

  ddpm_sampler* get() const { return sampler_.get(); }
  ddpm_sampler_info info() const {
    ddpm_sampler_info info = sized<ddpm_sampler_info>();
    check(ddpm_sampler_get_info(get(), &info));
    return info;
  }

  // Images first, ..., first + n - 1 of `seed`, (n, H, W, C).
  std::vector<std::uint8_t> sample(std::uint64_t seed, std::uint64_t first, std::size_t n) {
    std::vector<std::uint8_t> images(n * info().image_size);
    check(ddpm_sample(get(), seed, first, n, images.data()));
    return images;
  }
  std::vector<float> sample_float(std::uint64_t seed, std::uint64_t first, std::size_t n) {
    std::vector<float> images(n * info().image_size);
    check(ddpm_sample_float(get(), seed, first, n, images.data()));
    return images;
  }
  void run(const ddpm_sample_task& task) { check(ddpm_sample_run(get(), &task)); }
  void wait() { check(ddpm_sampler_wait(get())); }
  void cancel() { ddpm_cancel(get()); }

 private:
  struct Destroy {
    void operator()(ddpm_sampler* s) const { ddpm_sampler_destroy(s); }
  };
  std::unique_ptr<ddpm_sampler, Destroy> sampler_;
};

// A request of a pool. Destroying it cancels the request and waits for its end.
class Ticket {
 public:
  explicit Ticket(ddpm_ticket* ticket = nullptr) : ticket_(ticket) {}

  ddpm_ticket* get() const { return ticket_.get(); }
  void wait() { check(ddpm_ticket_wait(get())); }
  bool done() const { return ddpm_ticket_done(get()) != 0; }
  void cancel() { ddpm_ticket_cancel(get()); }

 private:
  struct Destroy {
    void operator()(ddpm_ticket* t) const { ddpm_ticket_destroy(t); }
  };
  std::unique_ptr<ddpm_ticket, Destroy> ticket_;
};

// For any number of threads.
class Pool {
 public:
  explicit Pool(const Model& model, const ddpm_pool_options& options = sized<ddpm_pool_options>()) {
    ddpm_pool* pool = nullptr;
    check(ddpm_pool_create(model.get(), &options, &pool));
    pool_.reset(pool);
  }

  ddpm_pool* get() const { return pool_.get(); }
  ddpm_pool_info info() const {
    ddpm_pool_info info = sized<ddpm_pool_info>();
    check(ddpm_pool_get_info(get(), &info));
    return info;
  }
  Ticket submit(const ddpm_pool_request& request) {
    ddpm_ticket* ticket = nullptr;
    check(ddpm_pool_submit(get(), &request, &ticket));
    return Ticket(ticket);
  }
  void drain() { check(ddpm_pool_drain(get())); }

 private:
  struct Destroy {
    void operator()(ddpm_pool* p) const { ddpm_pool_destroy(p); }
  };
  std::unique_ptr<ddpm_pool, Destroy> pool_;
};

}  // namespace api
}  // namespace ddpm

#endif  // DDPM_HPP_
