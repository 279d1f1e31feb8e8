// Images over HTTP, from one pool: http_server MODEL [PORT]
// Listens on 127.0.0.1 only; PORT 0 (the default) takes a free one. Prints the address, serves
// until SIGINT or SIGTERM. For other hosts put a proxy in front, which also knows users and limits.
//
//   GET /sample?seed=1&first=0&n=4&sampler=ddim&steps=20    image/png, the images side by side
//   GET /status                                             application/json, what the pool does
//
// Debian: libmicrohttpd-dev.
#include <arpa/inet.h>
#include <microhttpd.h>
#include <signal.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ddpm.hpp>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "png.h"

namespace {

namespace api = ddpm::api;
constexpr std::size_t kMostImages = 64;  // of a request
constexpr unsigned kMostConnections = 64;
constexpr double kTimeout = 60;  // seconds

struct Server {
  explicit Server(const char* folder) : model(folder), pool(model), info(model.info()) {}
  api::Model model;
  api::Pool pool;
  ddpm_info info;
};

struct Answer {
  unsigned status;
  const char* type;
  std::vector<std::uint8_t> body;
};

Answer text(unsigned status, const char* type, const std::string& s) {
  return {status, type, {s.begin(), s.end()}};
}

// A number of the query, `fallback` where it is absent.
std::uint64_t number(MHD_Connection* connection, const char* name, std::uint64_t fallback) {
  const char* value = MHD_lookup_connection_value(connection, MHD_GET_ARGUMENT_KIND, name);
  if (value == nullptr) return fallback;
  if (*value == '\0' || std::strlen(value) > 18 ||
      std::strspn(value, "0123456789") < std::strlen(value))
    throw api::Error(DDPM_USAGE, std::string(name) + " must be a number");
  return std::strtoull(value, nullptr, 10);
}

Answer sample(Server& server, MHD_Connection* connection) {
  ddpm_pool_request request = api::sized<ddpm_pool_request>();
  request.sampler = MHD_lookup_connection_value(connection, MHD_GET_ARGUMENT_KIND, "sampler");
  if (request.sampler == nullptr) request.sampler = "ddim";
  const std::uint64_t steps = number(connection, "steps", 0);
  request.steps = steps < 1000000 ? static_cast<std::int32_t>(steps) : -1;
  request.seed = number(connection, "seed", 0);
  request.first = number(connection, "first", 0);
  request.n = number(connection, "n", 1);
  request.timeout = kTimeout;
  if (request.n < 1 || request.n > kMostImages)
    throw api::Error(DDPM_USAGE, "n must be 1 to " + std::to_string(kMostImages));
  std::vector<std::uint8_t> images(request.n * server.pool.info().image_size);
  request.bytes = images.data();
  server.pool.submit(request).wait();  // this connection's thread has nothing else to do

  std::size_t size = 0;
  const std::unique_ptr<std::uint8_t, void (*)(void*)> png(
      png_of(images.data(), request.n, &server.info, &size), std::free);
  if (!png) throw api::Error(DDPM_MEMORY, "no memory for the picture");
  return {MHD_HTTP_OK, "image/png", {png.get(), png.get() + size}};
}

Answer status(Server& server) {
  const ddpm_pool_info i = server.pool.info();
  return text(MHD_HTTP_OK, "application/json",
              "{\"running\": " + std::to_string(i.running) + ", \"waiting\": " +
                  std::to_string(i.waiting) + ", \"images\": " + std::to_string(i.images) + "}\n");
}

unsigned http_status(ddpm_status status) {
  switch (status) {
    case DDPM_USAGE:
      return MHD_HTTP_BAD_REQUEST;
    case DDPM_FULL:
    case DDPM_STOPPED:
      return MHD_HTTP_SERVICE_UNAVAILABLE;
    case DDPM_TIMEOUT:
      return MHD_HTTP_GATEWAY_TIMEOUT;
    default:
      return MHD_HTTP_INTERNAL_SERVER_ERROR;
  }
}

Answer answer(Server& server, MHD_Connection* connection, const char* url, const char* method) {
  try {
    if (std::strcmp(method, "GET") != 0)
      return text(MHD_HTTP_METHOD_NOT_ALLOWED, "text/plain", "only GET\n");
    if (std::strcmp(url, "/sample") == 0) return sample(server, connection);
    if (std::strcmp(url, "/status") == 0) return status(server);
    return text(MHD_HTTP_NOT_FOUND, "text/plain", "there are /sample and /status\n");
  } catch (const api::Error& e) {
    return text(http_status(e.status()), "text/plain", std::string(e.what()) + "\n");
  } catch (const std::exception&) {
    return text(MHD_HTTP_INTERNAL_SERVER_ERROR, "text/plain", "out of memory\n");
  }
}

// On a thread of the connection.
MHD_Result handle(void* user, MHD_Connection* connection, const char* url, const char* method,
                  const char*, const char*, std::size_t* upload, void** seen) {
  static int marker;  // the first call is for the headers, before what is uploaded
  if (*seen == nullptr) {
    *seen = &marker;
    return MHD_YES;
  }
  if (*upload != 0) {  // not looked at
    *upload = 0;
    return MHD_YES;
  }
  Answer a = answer(*static_cast<Server*>(user), connection, url, method);
  MHD_Response* response =
      MHD_create_response_from_buffer(a.body.size(), a.body.data(), MHD_RESPMEM_MUST_COPY);
  if (response == nullptr) return MHD_NO;
  MHD_add_response_header(response, MHD_HTTP_HEADER_CONTENT_TYPE, a.type);
  if (a.status == MHD_HTTP_SERVICE_UNAVAILABLE)
    MHD_add_response_header(response, MHD_HTTP_HEADER_RETRY_AFTER, "1");
  const MHD_Result result = MHD_queue_response(connection, a.status, response);
  MHD_destroy_response(response);
  return result;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 2) {
    std::fprintf(stderr, "usage: http_server MODEL [PORT]\n");
    return DDPM_USAGE;
  }
  sigset_t stop;  // before there are threads, which inherit it
  sigemptyset(&stop);
  sigaddset(&stop, SIGINT);
  sigaddset(&stop, SIGTERM);
  sigprocmask(SIG_BLOCK, &stop, nullptr);

  Server server(argv[1]);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(static_cast<std::uint16_t>(argc > 2 ? std::atoi(argv[2]) : 0));
  MHD_Daemon* daemon =
      MHD_start_daemon(MHD_USE_THREAD_PER_CONNECTION | MHD_USE_INTERNAL_POLLING_THREAD, 0, nullptr,
                       nullptr, handle, &server, MHD_OPTION_SOCK_ADDR,
                       reinterpret_cast<sockaddr*>(&address), MHD_OPTION_CONNECTION_LIMIT,
                       kMostConnections, MHD_OPTION_CONNECTION_TIMEOUT, 10u, MHD_OPTION_END);
  if (daemon == nullptr) {
    std::fprintf(stderr, "cannot listen on 127.0.0.1\n");
    return EXIT_FAILURE;
  }
  std::printf("http://127.0.0.1:%d\n",
              MHD_get_daemon_info(daemon, MHD_DAEMON_INFO_BIND_PORT)->port);
  std::fflush(stdout);

  int signal = 0;
  sigwait(&stop, &signal);
  ddpm_pool_drain(server.pool.get());  // those that wait get their images, or their timeout
  MHD_stop_daemon(daemon);
} catch (const api::Error& e) {
  std::fprintf(stderr, "%s: %s\n", ddpm_status_string(e.status()), e.what());
  return e.status();
}
