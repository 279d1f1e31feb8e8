// Where ranks meet over TCP. Rank 0 listens; each other rank comes with two connections: one for
// messages, and one for signs of life, which must not wait behind a message.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace ddpm {

class Socket {
 public:
  Socket() = default;
  explicit Socket(int fd) : fd_(fd) {}
  Socket(Socket&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Socket& operator=(Socket&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Socket() { close(); }
  int fd() const { return fd_; }
  bool open() const { return fd_ >= 0; }
  void close();

 private:
  int fd_ = -1;
};

// Another rank, with which this one is connected.
struct Peer {
  int rank = 0;
  std::string host;  // the name of its machine
  Socket messages;   // waits in its calls
  Socket signs;      // does not
};

// All ranks, within `timeout` seconds of each other: at "host:port" of rank 0's machine. Rank 0
// gets the others, in order; another one gets rank 0; nothing where not all have come. What else
// connects is dropped: strangers, ranks of a run of another size, and a rank that is there already.
// Error(kUsage) where the place is none, or rank 0 cannot listen there.
std::optional<std::vector<Peer>> meet(const std::string& place, int rank, int size, double timeout);

}  // namespace ddpm
