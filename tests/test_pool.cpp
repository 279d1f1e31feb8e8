// Pools of the C entry: an image is what a sampler makes alone, whatever shares its batch.
#include <catch2/catch.hpp>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <future>
#include <limits>
#include <thread>

#include "tests/c_api_support.h"

using namespace ddpm;
using namespace test::c;

namespace {

constexpr size_t kImage = 8 * 8 * 3;
using Bytes = std::vector<uint8_t>;
using Floats = std::vector<float>;

Pool create_pool(const Model& m, int batch, size_t queue = 0, double guidance = 0) {
  ddpm_pool_options o{};
  o.struct_size = sizeof o;
  o.batch_size = batch;
  o.queue_size = queue;
  o.guidance = guidance;
  ddpm_pool* p = nullptr;
  ok(ddpm_pool_create(m.get(), &o, &p));
  return Pool(p);
}

ddpm_pool_request request(size_t n, const char* sampler, int steps) {
  ddpm_pool_request q{};
  q.struct_size = sizeof q;
  q.n = n;
  q.sampler = sampler;
  q.steps = steps;
  return q;
}

Ticket submit(const Pool& pool, const ddpm_pool_request& q) {
  ddpm_ticket* t = nullptr;
  ok(ddpm_pool_submit(pool.get(), &q, &t));
  REQUIRE(t != nullptr);
  return Ticket(t);
}

ddpm_pool_info info_of(const Pool& pool) {
  ddpm_pool_info info{};
  info.struct_size = sizeof info;
  ok(ddpm_pool_get_info(pool.get(), &info));
  return info;
}

// The images of a request by a sampler of the same options, alone.
Floats alone(const Model& model, const ddpm_pool_request& q, int batch, double guidance = 0) {
  ddpm_sampler_options o{};
  o.struct_size = sizeof o;
  o.batch_size = batch;
  o.sampler = q.sampler;
  o.spacing = q.spacing;
  o.eta = q.eta;
  o.steps = q.steps;
  o.guidance = guidance;
  ddpm_sampler* raw = nullptr;
  ok(ddpm_sampler_create(model.get(), &o, &raw));
  const Sampler s(raw);
  Floats images(q.n * kImage);
  ddpm_sample_task t{};
  t.struct_size = sizeof t;
  t.seed = q.seed;
  t.first = q.first;
  t.n = q.n;
  t.labels = q.labels;
  t.x_T = q.x_T;
  t.seeds = q.seeds;
  t.guidance = q.guidance;
  t.floats = images.data();
  ok(ddpm_sample_run(s.get(), &t));
  return images;
}

// Holds the pool between two steps until it is opened, so that what is submitted meanwhile starts
// in one step.
class Gate {
 public:
  explicit Gate(const Pool& pool) {
    ddpm_pool_request q = request(0, nullptr, 0);
    q.done = [](void* user, ddpm_status, const char*) {
      auto* gate = static_cast<Gate*>(user);
      gate->reached_.set_value();
      gate->opened_.get_future().wait();
    };
    q.user = this;
    ok(ddpm_pool_submit(pool.get(), &q, nullptr));
    reached_.get_future().wait();
  }
  void open() { opened_.set_value(); }

 private:
  std::promise<void> reached_, opened_;
};

// Requests of every kind, with what they read.
struct Mix {
  std::vector<ddpm_pool_request> requests;
  Floats start = Floats(2 * kImage);
  std::vector<uint64_t> seeds = {7, 1, uint64_t{1} << 60};
  std::vector<int32_t> labels = {3, 0, 9};

  explicit Mix(bool classes) {
    for (size_t i = 0; i < start.size(); ++i) start[i] = static_cast<float>(i % 17) / 8 - 1;
    requests = {request(2, "ddpm", 7),    request(1, "ddim", 5),  request(3, "dpmpp2m", 4),
                request(2, "ddim", 9),    request(3, nullptr, 3), request(1, "ddpm", 1),
                request(2, "dpmpp2m", 11)};
    for (size_t i = 0; i < requests.size(); ++i) {
      requests[i].seed = i % 3;
      requests[i].first = 5 * i;
    }
    requests[1].eta = 0.7;
    requests[1].spacing = "trailing";
    requests[3].x_T = start.data();
    requests[4].seeds = seeds.data();
    if (classes) requests[2].labels = labels.data();
  }
};

}  // namespace

TEST_CASE("pool: images are those of samplers alone, to the bit", "[pool]") {
  for (const std::string name : {"small", "small_classes", "small_learned"})
    for (const bool invariant : {false, true}) {
      if (invariant && name == "small_learned") continue;
      CAPTURE(name, invariant);
      ddpm_model_options mo{};
      mo.struct_size = sizeof mo;
      mo.device = "cpu";
      mo.threads = kThreads;
      mo.batch_invariant = invariant ? 1 : 0;
      ddpm_model* raw = nullptr;
      ok(ddpm_model_load(model_folder(name).c_str(), &mo, &raw));
      const Model model(raw);
      const Pool pool = create_pool(model, 3);
      const Mix mix(name != "small");
      std::vector<Floats> floats;
      std::vector<Bytes> bytes;
      for (const ddpm_pool_request& q : mix.requests) {
        floats.emplace_back(q.n * kImage + 1, -7.0f);
        bytes.emplace_back(q.n * kImage + 1, uint8_t{7});
      }
      std::vector<Ticket> tickets;
      Gate gate(pool);
      for (size_t i = 0; i < mix.requests.size(); ++i) {
        ddpm_pool_request q = mix.requests[i];
        if (i % 3 != 1) q.floats = floats[i].data();
        if (i % 3 != 0) q.bytes = bytes[i].data();
        tickets.push_back(submit(pool, q));
      }
      CHECK(info_of(pool).waiting == 14);
      gate.open();
      for (size_t i = 0; i < mix.requests.size(); ++i) {
        CAPTURE(i);
        ok(ddpm_ticket_wait(tickets[i].get()));
        CHECK(ddpm_ticket_done(tickets[i].get()) == 1);
        // With batch_invariant the sampler's batch need not be the pool's.
        const Floats expected = alone(model, mix.requests[i], invariant ? 1 : 3);
        Bytes expected_bytes;
        for (float x : expected)
          expected_bytes.push_back(static_cast<uint8_t>(
              std::floor(std::clamp((x + 1.0f) * 127.5f, 0.0f, 255.0f) + 0.5f)));
        CHECK(floats[i].back() == -7.0f);
        CHECK(bytes[i].back() == 7);
        floats[i].pop_back();
        bytes[i].pop_back();
        CHECK((floats[i] == (i % 3 != 1 ? expected : Floats(expected.size(), -7.0f))));
        CHECK((bytes[i] == (i % 3 != 0 ? expected_bytes : Bytes(expected.size(), 7))));
      }
      CHECK(info_of(pool).images == 14);
    }
}

TEST_CASE("pool: requests of other guidance share a batch, each as alone to the bit", "[pool]") {
  const Model model = open_model(model_folder("small_guided"));
  const Pool pool = create_pool(model, 3, 0, 2.5);
  Mix mix(false);
  const double scales[] = {0, 4, 1, 0.25, 7, 1000, 0};
  std::vector<Floats> images;
  std::vector<Ticket> tickets;
  Gate gate(pool);
  for (size_t i = 0; i < mix.requests.size(); ++i) {
    ddpm_pool_request& q = mix.requests[i];
    images.emplace_back(q.n * kImage);
    q.floats = images[i].data();
    q.guidance = scales[i];
    tickets.push_back(submit(pool, q));
  }
  gate.open();
  for (size_t i = 0; i < mix.requests.size(); ++i) {
    CAPTURE(i);
    ok(ddpm_ticket_wait(tickets[i].get()));
    CHECK((images[i] == alone(model, mix.requests[i], 3, 2.5)));
    CHECK((images[i] != alone(model, mix.requests[i], 3, 3.5)) == (scales[i] == 0));
  }
  // A program of an older header.
  ddpm_pool_request older = mix.requests[1];
  older.struct_size = offsetof(ddpm_pool_request, guidance);
  older.floats = images[1].data();
  ok(ddpm_ticket_wait(submit(pool, older).get()));
  older.guidance = 0;
  CHECK((images[1] == alone(model, older, 3, 2.5)));
}

// The CPU's device memory is the host's.
TEST_CASE("pool: images into device pointers, beside those of the host", "[pool]") {
  const Model model = open_model(model_folder("small"));
  const Pool pool = create_pool(model, 3);
  ddpm_pool_request q = request(2, "dpmpp2m", 4);  // it may leave [-1, 1]
  Floats device(2 * kImage + 1, -7.0f), host = device, alone(2 * kImage);
  Bytes device_bytes(2 * kImage + 1, 7), host_bytes = device_bytes;
  q.floats = host.data();
  q.bytes = host_bytes.data();
  const Ticket on_host = submit(pool, q);
  q.on_device = 1;
  q.floats = device.data();
  q.bytes = device_bytes.data();
  const Ticket on_device = submit(pool, q);
  ok(ddpm_ticket_wait(on_device.get()));
  ok(ddpm_ticket_wait(on_host.get()));

  ddpm_sampler_options o{};
  o.struct_size = sizeof o;
  o.batch_size = 3;
  o.sampler = q.sampler;
  o.steps = q.steps;
  ddpm_sampler* raw = nullptr;
  ok(ddpm_sampler_create(model.get(), &o, &raw));
  ok(ddpm_sample_device(Sampler(raw).get(), q.seed, q.first, q.n, alone.data(), nullptr));
  CHECK(std::any_of(alone.begin(), alone.end(), [](float v) { return std::abs(v) > 1; }));
  CHECK((Floats(device.begin(), device.end() - 1) == alone));
  CHECK((device_bytes == host_bytes));
  CHECK(device_bytes.back() == 7);
  for (float& v : alone) v = std::clamp(v, -1.0f, 1.0f);
  CHECK((Floats(host.begin(), host.end() - 1) == alone));
  CHECK(host.back() == -7.0f);
  CHECK(device.back() == -7.0f);
}

TEST_CASE("pool: images join and leave at each step, requests take turns", "[pool]") {
  const Model model = open_model(model_folder("small"));
  const Pool pool = create_pool(model, 2);
  Floats a(6 * kImage), b(kImage), c(kImage);
  std::vector<int> order;
  struct Named {
    std::vector<int>* order;
    int name;
  } names[] = {{&order, 0}, {&order, 1}, {&order, 2}};
  const auto note = [](void* user, ddpm_status, const char*) {
    static_cast<Named*>(user)->order->push_back(static_cast<Named*>(user)->name);
  };
  const auto ask = [&](size_t n, int steps, Floats& to, int name) {
    ddpm_pool_request q = request(n, "ddim", steps);
    q.floats = to.data();
    q.done = note;
    q.user = &names[name];
    return submit(pool, q);
  };
  Gate gate(pool);
  const uint64_t before = info_of(pool).steps;
  const Ticket ta = ask(6, 4, a, 0), tb = ask(1, 10, b, 1), tc = ask(1, 2, c, 2);
  gate.open();
  for (const Ticket* t : {&ta, &tb, &tc}) ok(ddpm_ticket_wait(t->get()));
  // a's first image and b begin; c takes the place of the first in step 5, a's second that of c in
  // step 7; from step 11 on, b's place is a's too.
  CHECK(order == std::vector<int>{2, 1, 0});
  CHECK(info_of(pool).steps - before == 18);
  CHECK(info_of(pool).images == 8);
  CHECK(info_of(pool).running == 0);
}

TEST_CASE("pool: the queue is bounded, and refuses what it has no room for", "[pool]") {
  const Model model = open_model(model_folder("small"));
  const Pool pool = create_pool(model, 1, 4);
  Floats images(4 * kImage);
  ddpm_pool_request q = request(3, "ddim", 2);
  q.floats = images.data();
  Gate gate(pool);
  const Ticket first = submit(pool, q);
  ddpm_ticket* none = nullptr;
  q.n = 2;
  CHECK(ddpm_pool_submit(pool.get(), &q, &none) == DDPM_FULL);
  CHECK(none == nullptr);
  CHECK(std::string(ddpm_last_error()).find("3 of 4 images wait") == 0);
  q.n = 1;
  const Ticket second = submit(pool, q);
  CHECK(ddpm_pool_submit(pool.get(), &q, &none) == DDPM_FULL);
  q.n = 5;
  CHECK(ddpm_pool_submit(pool.get(), &q, &none) == DDPM_USAGE);  // it never has room
  CHECK(info_of(pool).waiting == 4);
  gate.open();
  ok(ddpm_ticket_wait(first.get()));
  ok(ddpm_ticket_wait(second.get()));
  q.n = 4;
  ok(ddpm_ticket_wait(submit(pool, q).get()));
  CHECK(info_of(pool).waiting == 0);
}

TEST_CASE("pool: cancelling, deadlines and bad values end one request and no other", "[pool]") {
  const Model model = open_model(model_folder("small"));
  const Pool pool = create_pool(model, 3);
  Floats good(5 * kImage), other(3 * kImage), start(kImage);
  start[5] = std::nanf("");
  ddpm_pool_request q = request(5, "ddpm", 40);
  q.floats = good.data();
  q.seed = 2;
  const Floats expected = alone(model, q, 3);
  const auto ends = [&](const ddpm_pool_request& bad, ddpm_status status, const char* text,
                        bool cancel) {
    std::fill(good.begin(), good.end(), 0.0f);
    Gate gate(pool);
    const Ticket a = submit(pool, q), b = submit(pool, bad);
    if (cancel) ddpm_ticket_cancel(b.get());
    gate.open();
    CHECK(ddpm_ticket_wait(b.get()) == status);
    CHECK(ddpm_ticket_wait(b.get()) == status);
    CHECK(std::string(ddpm_last_error()).find(text) != std::string::npos);
    ok(ddpm_ticket_wait(a.get()));
    CHECK((good == expected));
  };
  ddpm_pool_request bad = request(3, "ddim", 1000);
  bad.floats = other.data();
  ends(bad, DDPM_STOPPED, "ddpm_ticket_cancel", true);
  CHECK((other == Floats(other.size())));
  bad.timeout = 1e-9;
  ends(bad, DDPM_TIMEOUT, "timeout", false);
  bad.timeout = 0.02;  // 3000 steps of a network take longer anywhere
  ends(bad, DDPM_TIMEOUT, "timeout", false);
  bad = request(1, "ddim", 5);
  bad.floats = other.data();
  bad.x_T = start.data();
  ends(bad, DDPM_NONFINITE, "not finite", false);
  bad.timeout = 1e9;
  bad.x_T = nullptr;
  ends(bad, DDPM_OK, "", false);  // in the place of the image that was not finite, or beside it

  // In the middle of a chain, and by destroying the ticket.
  ddpm_pool_request endless = request(3, "ddpm", 1000);
  endless.floats = other.data();
  for (const bool destroy : {false, true}) {
    Ticket t = submit(pool, endless);
    const uint64_t steps = info_of(pool).steps;
    while (info_of(pool).steps < steps + 3) std::this_thread::yield();
    CHECK(ddpm_ticket_done(t.get()) == 0);
    if (destroy) {
      t.reset();
    } else {
      ddpm_ticket_cancel(t.get());
      CHECK(ddpm_ticket_wait(t.get()) == DDPM_STOPPED);
    }
    CHECK(info_of(pool).running + info_of(pool).waiting == 0);
  }
}

TEST_CASE("pool: ends with its requests, which may outlive it", "[pool]") {
  Model model = open_model(model_folder("small"));
  Pool pool = create_pool(model, 2);
  model.reset();
  Floats images(4 * kImage);
  std::atomic<int> stopped{0};
  ddpm_pool_request q = request(4, "ddpm", 1000);
  q.floats = images.data();
  q.user = &stopped;
  q.done = [](void* user, ddpm_status status, const char*) {
    if (status == DDPM_STOPPED) ++*static_cast<std::atomic<int>*>(user);
  };
  const Ticket a = submit(pool, q), b = submit(pool, q);
  pool.reset();
  CHECK(stopped == 2);
  CHECK(ddpm_ticket_wait(a.get()) == DDPM_STOPPED);
  CHECK(std::string(ddpm_last_error()).find("ddpm_pool_destroy") != std::string::npos);
  CHECK(ddpm_ticket_done(b.get()) == 1);

  const Model again = open_model(model_folder("small"));
  const Pool drained = create_pool(again, 2);
  q = request(4, "ddim", 5);
  q.floats = images.data();
  const Ticket c = submit(drained, q);
  ok(ddpm_pool_drain(drained.get()));
  CHECK(ddpm_ticket_done(c.get()) == 1);
  ok(ddpm_ticket_wait(c.get()));
  ddpm_ticket* none = nullptr;
  CHECK(ddpm_pool_submit(drained.get(), &q, &none) == DDPM_STOPPED);
  CHECK(none == nullptr);
  ok(ddpm_pool_drain(drained.get()));
}

TEST_CASE("pool: what a callback may do", "[pool]") {
  const Model model = open_model(model_folder("small"));
  const Pool pool = create_pool(model, 2);
  struct State {
    ddpm_pool* pool;
    Floats images = Floats(2 * kImage);
    ddpm_ticket *own = nullptr, *next = nullptr;
    ddpm_status submitted = DDPM_BUG, waited = DDPM_OK, drained = DDPM_OK, informed = DDPM_BUG;
    int own_done = -1;
    std::promise<void> ready;
  } state{pool.get()};
  ddpm_pool_request q = request(1, "ddim", 2);
  q.floats = state.images.data();
  q.user = &state;
  q.done = [](void* user, ddpm_status, const char*) {
    auto& s = *static_cast<State*>(user);
    ddpm_pool_request more = request(1, "ddim", 3);
    more.floats = s.images.data() + kImage;
    s.submitted = ddpm_pool_submit(s.pool, &more, &s.next);
    s.waited = ddpm_ticket_wait(s.next);
    s.drained = ddpm_pool_drain(s.pool);
    s.own_done = ddpm_ticket_done(s.own);
    ddpm_pool_destroy(s.pool);  // refused
    ddpm_ticket_destroy(s.own);
    ddpm_pool_info info{};
    info.struct_size = sizeof info;
    s.informed = ddpm_pool_get_info(s.pool, &info);
    s.ready.set_value();
  };
  Gate gate(pool);
  ok(ddpm_pool_submit(pool.get(), &q, &state.own));
  gate.open();
  state.ready.get_future().wait();
  CHECK(state.submitted == DDPM_OK);
  CHECK(state.waited == DDPM_USAGE);
  CHECK(state.drained == DDPM_USAGE);
  CHECK(state.own_done == 0);
  CHECK(state.informed == DDPM_OK);
  const Ticket next(state.next);
  ok(ddpm_ticket_wait(next.get()));
  CHECK((Floats(state.images.begin() + kImage, state.images.end()) ==
         alone(model, request(1, "ddim", 3), 2)));
}

TEST_CASE("pool: threads submit, cancel, wait and free", "[pool]") {
  constexpr int kSamples = 25, kThreadCount = 8;
  const Model model = open_model(model_folder("small"), nullptr, 1);
  ddpm_pool_request all = request(kSamples, "ddim", 5);
  const Floats expected = alone(model, all, 4);
  const Pool pool = create_pool(model, 4, 64);
  std::atomic<int> wrong{0}, called{0}, full{0};
  const auto work = [&](int thread) {
    for (int i = 0; i < kSamples; ++i) {
      const int k = (i * 7 + thread * 3) % kSamples;
      Floats image(kImage);
      ddpm_pool_request q = request(1, "ddim", 5);
      q.first = static_cast<uint64_t>(k);
      q.floats = image.data();
      q.user = &called;
      q.done = [](void* user, ddpm_status, const char*) {
        ++*static_cast<std::atomic<int>*>(user);
      };
      ddpm_ticket* raw = nullptr;
      ddpm_status status;
      while ((status = ddpm_pool_submit(pool.get(), &q, &raw)) == DDPM_FULL) ++full;
      Ticket t(raw);
      if (status != DDPM_OK) ++wrong;
      if (i % 4 == 3) {
        std::thread other([&] { ddpm_ticket_cancel(t.get()); });
        status = ddpm_ticket_wait(t.get());
        other.join();
        if (status == DDPM_STOPPED) continue;
      } else if (i % 4 == 2) {
        t.reset();  // cancelled
        continue;
      } else {
        status = ddpm_ticket_wait(t.get());
      }
      if (status != DDPM_OK || std::memcmp(image.data(), &expected[static_cast<size_t>(k) * kImage],
                                           kImage * sizeof(float)) != 0)
        ++wrong;
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreadCount; ++i) threads.emplace_back(work, i);
  for (std::thread& t : threads) t.join();
  ok(ddpm_pool_drain(pool.get()));
  CHECK(wrong == 0);
  CHECK(called == kThreadCount * kSamples);
}

TEST_CASE("pool: every bad argument is refused with its status", "[pool]") {
  const Model model = open_model(model_folder("small"));
  const auto fails = [](ddpm_status status, const char* part) {
    INFO(ddpm_last_error() << " / " << part);
    CHECK(status == DDPM_USAGE);
    CHECK(std::string(ddpm_last_error()).find(part) != std::string::npos);
  };
  ddpm_pool* none = nullptr;
  ddpm_pool_options o{};
  fails(ddpm_pool_create(nullptr, nullptr, &none), "model is NULL");
  fails(ddpm_pool_create(model.get(), nullptr, nullptr), "pool is NULL");
  fails(ddpm_pool_create(model.get(), &o, &none), "struct_size");
  o.struct_size = sizeof o;
  for (int batch : {-1, 4097, std::numeric_limits<int>::max()}) {
    o.batch_size = batch;
    fails(ddpm_pool_create(model.get(), &o, &none), "batch_size");
  }
  o.batch_size = 0;
  for (double w : {-1.0, 1000.1, std::nan("")}) {
    o.guidance = w;
    fails(ddpm_pool_create(model.get(), &o, &none), "guidance must be 0 to 1000");
  }
  o.guidance = 2;
  fails(ddpm_pool_create(model.get(), &o, &none), "guidance 2: the model has no classes");
  CHECK(none == nullptr);

  const Pool pool = create_pool(model, 2);
  Floats images(kImage);
  ddpm_ticket* ticket = nullptr;
  const auto with = [&](auto change) {
    ddpm_pool_request q = request(1, "ddim", 2);
    q.floats = images.data();
    change(q);
    const ddpm_status status = ddpm_pool_submit(pool.get(), &q, &ticket);
    CHECK(ticket == nullptr);
    return status;
  };
  ddpm_pool_request good = request(1, "ddim", 2);
  good.floats = images.data();
  constexpr size_t kHuge = std::numeric_limits<size_t>::max();
  const int32_t label = 0;
  fails(ddpm_pool_submit(nullptr, &good, &ticket), "pool is NULL");
  fails(ddpm_pool_submit(pool.get(), nullptr, &ticket), "request is NULL");
  fails(ddpm_pool_submit(pool.get(), &good, nullptr), "ticket and request's done");
  for (uint32_t size : {0u, 4u, ~0u})
    fails(with([&](auto& q) { q.struct_size = size; }), "struct_size");
  fails(with([](auto& q) { q.floats = nullptr; }), "bytes and floats");
  for (int bad : {-1, 2}) fails(with([&](auto& q) { q.on_device = bad; }), "on_device");
  for (size_t n : {size_t{1025}, kHuge}) fails(with([&](auto& q) { q.n = n; }), "queue_size 1024");
  fails(with([](auto& q) { q.first = kHuge; }), "first + n");
  fails(with([](auto& q) { q.steps = -1; }), "steps");
  fails(with([](auto& q) { q.steps = 1001; }), "steps");
  fails(with([](auto& q) { q.sampler = "euler"; }), "euler");
  fails(with([](auto& q) { q.spacing = "karras"; }), "karras");
  fails(with([](auto& q) { q.eta = 2; }), "eta");
  fails(with([&](auto& q) { q.labels = &label; }), "no classes");
  fails(with([](auto& q) { q.guidance = 1001; }), "guidance must be 0 to 1000");
  fails(with([](auto& q) { q.guidance = 2; }), "guidance 2: the sampler or pool is not guided");
  for (double t : {-1.0, 1.1e9, std::nan(""), std::numeric_limits<double>::infinity()})
    fails(with([&](auto& q) { q.timeout = t; }), "timeout");
  fails(ddpm_ticket_wait(nullptr), "ticket is NULL");
  fails(ddpm_pool_drain(nullptr), "pool is NULL");
  ddpm_pool_info info{};
  fails(ddpm_pool_get_info(nullptr, &info), "pool is NULL");
  fails(ddpm_pool_get_info(pool.get(), nullptr), "info is NULL");
  fails(ddpm_pool_get_info(pool.get(), &info), "struct_size");
  info = info_of(pool);
  CHECK(info.batch_size == 2);
  CHECK(info.queue_size == 1024);
  CHECK(info.image_size == kImage);
  CHECK(info.device_bytes > 100000);
  CHECK((images == Floats(kImage)));
  CHECK(ddpm_ticket_done(nullptr) == 0);
  ddpm_ticket_cancel(nullptr);
  ddpm_ticket_destroy(nullptr);
  ddpm_pool_destroy(nullptr);
  CHECK(std::string(ddpm_status_string(DDPM_FULL)) == "the queue has no room now");
  CHECK(std::string(ddpm_status_string(DDPM_TIMEOUT)) == "a deadline passed");

  const Model classes = open_model(model_folder("small_classes"));
  const Pool labelled = create_pool(classes, 2);
  for (int32_t bad : {-1, 10}) {
    good.labels = &bad;
    fails(ddpm_pool_submit(labelled.get(), &good, &ticket), "labels");
  }
}

#ifdef DDPM_C_API_SOAK
TEST_CASE("pool: samplers and a pool under load, memory that does not grow", "[pool]") {
  const auto run = [](const char* what, const char* numbers) {
    const std::string command =
        std::string(DDPM_C_API_SOAK) + " " + what + " '" + model_folder("least") + "' " + numbers;
    const int status = std::system(command.c_str());
    REQUIRE(WIFEXITED(status));
    return WEXITSTATUS(status);
  };
  CHECK(run("threads", "8 40") == 0);
#ifndef DDPM_SANITIZED  // they keep what is freed for a while
  CHECK(run("growth", "10000") == 0);
  CHECK(run("leak", "2000") == 1);
#endif
}
#endif
