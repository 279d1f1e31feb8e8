#include <fcntl.h>
#include <sys/stat.h>

#include <catch2/catch.hpp>
#include <cerrno>
#include <functional>
#include <optional>
#include <set>
#include <vector>

#include "engine/file_io.h"
#include "tests/faulty_file_system.h"
#include "tests/temp_folder.h"

using namespace ddpm;
using namespace ddpm::test;
using Catch::Matchers::Contains;

namespace {

// The message of the Error that `call` throws with `status`.
std::string error_of(Status status, const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& e) {
    CHECK(e.status() == status);
    return e.what();
  }
  FAIL("no error was thrown");
  return {};
}

using Tree = std::map<std::string, std::string>;

const std::string kLong(100000, 'x');
const Tree kOldFolder = {{"config.json", "old"}, {"unet/", ""}, {"unet/weights", "old weights"}};
const Tree kNewFolder = {
    {"config.json", "new"}, {"unet/", ""}, {"unet/a/", ""}, {"unet/a/deep", ""}, {"unet/w", kLong}};

void save_folder(const std::string& path, const Tree& tree, FileSystem& fs) {
  OutputFolder folder(path, fs);
  for (const auto& [name, bytes] : tree) {
    if (name.back() == '/') continue;
    OutputFile file = folder.file(name);
    file.write(bytes.substr(0, bytes.size() / 2));
    file.write(bytes.substr(bytes.size() / 2));
    file.commit();
  }
  folder.commit();
}

void put_tree(const std::string& path, const Tree& tree) {
  std::filesystem::create_directories(path);
  for (const auto& [name, bytes] : tree) {
    if (name.back() == '/')
      std::filesystem::create_directories(path + "/" + name);
    else
      put_bytes(path + "/" + name, bytes);
  }
}

}  // namespace

TEST_CASE("file_io: reading is bounded and names what is wrong", "[file_io]") {
  TempFolder folder;
  put_bytes(folder / "five", "01234");
  const InputFile file(folder / "five");
  CHECK(file.size() == 5);
  char bytes[5] = {};
  file.read(1, bytes, 3);
  CHECK(std::string(bytes, 3) == "123");
  file.read(5, bytes, 0);
  for (const auto& [offset, count] : std::vector<std::pair<uint64_t, size_t>>{
           {0, 6}, {5, 1}, {6, 0}, {UINT64_MAX, 2}, {2, SIZE_MAX}, {UINT64_MAX, SIZE_MAX}}) {
    const std::string message = error_of(Status::kFile, [&] { file.read(offset, bytes, count); });
    CHECK_THAT(message, Contains(folder / "five") && Contains("too short"));
  }
  std::filesystem::resize_file(folder / "five", 2);
  CHECK_THAT(error_of(Status::kFile, [&] { file.read(0, bytes, 5); }), Contains("became shorter"));

  CHECK_THAT(error_of(Status::kFile, [&] { InputFile(folder / "absent"); }),
             Contains("absent': No such file") && Contains("check the path"));
  CHECK_THAT(error_of(Status::kConfig, [&] { InputFile(folder / "absent", Status::kConfig); }),
             Contains("absent"));
  CHECK_THAT(error_of(Status::kFile, [&] { InputFile file(folder.path(), Status::kConfig); }),
             Contains("a folder"));
  CHECK_THAT(error_of(Status::kFile, [&] { InputFile file("/dev/zero"); }), Contains("a device"));
  REQUIRE(::mkfifo((folder / "pipe").c_str(), 0600) == 0);
  CHECK_THAT(error_of(Status::kFile, [&] { InputFile file(folder / "pipe"); }), Contains("pipe"));

  CHECK(file_exists(folder / "five"));
  CHECK_FALSE(file_exists(folder.path()));
  CHECK_FALSE(file_exists(folder / "absent"));
  CHECK(folder_exists(folder.path()));
  CHECK_FALSE(folder_exists(folder / "five"));
}

TEST_CASE("file_io: a small file is read whole, up to its limit", "[file_io]") {
  TempFolder folder;
  put_bytes(folder / "f", std::string("a\0b", 3));
  CHECK(read_small_file(folder / "f", 3) == std::string("a\0b", 3));
  CHECK_THAT(error_of(Status::kFile, [&] { read_small_file(folder / "f", 2); }),
             Contains("3 bytes") && Contains("at most 2"));
  put_bytes(folder / "empty", "");
  CHECK(read_small_file(folder / "empty", 0).empty());
}

TEST_CASE("file_io: an output file appears on commit only", "[file_io]") {
  TempFolder folder;
  {
    OutputFile file(folder / "f");
    file.write("half");
    CHECK_FALSE(file_exists(folder / "f"));
  }
  CHECK(tree_of(folder.path()).empty());
  write_file(folder / "f", "first");
  CHECK(tree_of(folder.path()) == Tree{{"f", "first"}});
  {
    OutputFile file(folder / "f");
    file.write("second");
    CHECK(get_bytes(folder / "f") == "first");
    file.commit();
    CHECK_THROWS_AS(file.write("more"), Error);
    CHECK_THROWS_AS(file.commit(), Error);
  }
  CHECK(tree_of(folder.path()) == Tree{{"f", "second"}});

  // A link is followed, not replaced.
  std::filesystem::create_symlink("f", folder / "link");
  write_file(folder / "link", "third");
  CHECK(std::filesystem::is_symlink(folder / "link"));
  CHECK(get_bytes(folder / "f") == "third");

  std::filesystem::create_directory(folder / "sub");
  CHECK_THAT(error_of(Status::kFile, [&] { write_file(folder / "sub", ""); }),
             Contains("a folder"));
  CHECK_THAT(error_of(Status::kFile, [&] { write_file(folder / "sub/", ""); }),
             Contains("a folder"));
  CHECK_THAT(error_of(Status::kFile, [&] { write_file(folder / "no/f", ""); }),
             Contains("no/f': No such file"));
  CHECK_THAT(error_of(Status::kFile, [&] { write_file("/dev/full", ""); }), Contains("a device"));
  CHECK_THAT(error_of(Status::kFile, [&] { write_file("", ""); }), Contains("names no file"));
  CHECK_THAT(error_of(Status::kFile, [&] { write_file(folder / "..", ""); }),
             Contains("names no file"));
}

TEST_CASE("file_io: short writes and interrupted calls are carried on", "[file_io]") {
  TempFolder folder;
  FaultyFileSystem drip(Fault::kNone, 0, 0);
  drip.longest_write = 7;
  write_file(folder / "f", kLong.substr(0, 1000), drip);
  CHECK(get_bytes(folder / "f") == kLong.substr(0, 1000));
  for (int k = 0; k < 3; ++k) {  // open, write, fsync
    FaultyFileSystem interrupted(Fault::kOnce, k, EINTR);
    write_file(folder / "g", std::to_string(k), interrupted);
    CHECK(get_bytes(folder / "g") == std::to_string(k));
  }
}

TEST_CASE("file_io: an error before the rename keeps the old file", "[file_io]") {
  for (int k = 0; k < 5; ++k) {  // open, write, fsync, close, rename
    TempFolder folder;
    put_bytes(folder / "f", "old");
    FaultyFileSystem fs(Fault::kOnce, k, EIO);
    CHECK_THAT(error_of(Status::kFile, [&] { write_file(folder / "f", "new", fs); }),
               Contains(folder / "f") && Contains("Input/output error; check the disk"));
    CHECK(tree_of(folder.path()) == Tree{{"f", "old"}});
  }
}

TEST_CASE("file_io: whichever operation fails, a file is old or new", "[file_io]") {
  for (const bool had_old : {false, true})
    for (const Fault fault : {Fault::kOnce, Fault::kShort, Fault::kDead})
      for (const int error : {ENOSPC, EIO, EDQUOT}) {
        int k = 0;
        for (bool reached = true; reached; ++k) {
          TempFolder folder;
          const std::string path = folder / "model.bin";
          if (had_old) put_bytes(path, "old");
          FaultyFileSystem fs(fault, k, error);
          std::optional<std::string> message;
          try {
            write_file(path, kLong, fs);
          } catch (const Error& e) {
            CHECK(e.status() == Status::kFile);
            message = e.what();
          }
          reached = fs.was_reached();
          if (fault == Fault::kDead) recover(path);
          const Tree tree = tree_of(folder.path());
          const Tree before = had_old ? Tree{{"model.bin", "old"}} : Tree{};
          const Tree after = {{"model.bin", kLong}};
          INFO("operation " << k << ", errno " << error << ", " << message.value_or("no error"));
          CHECK((message ? tree == before || tree == after : tree == after));
          if (message) CHECK_THAT(*message, Contains(path) && Contains("; "));
        }
        CHECK(k >= 8);  // open, write, fsync, close, rename, and the folder's three
      }
}

TEST_CASE("file_io: whichever operation fails, a folder is old or new", "[file_io]") {
  for (const bool can_exchange : {true, false})
    for (const bool had_old : {false, true})
      for (const Fault fault : {Fault::kOnce, Fault::kShort, Fault::kDead})
        for (const int error : {ENOSPC, EIO}) {
          int k = 0;
          for (bool reached = true; reached; ++k) {
            TempFolder folder;
            const std::string path = folder / "step-7";
            if (had_old) put_tree(path, kOldFolder);
            FaultyFileSystem fs(fault, k, error);
            fs.can_exchange = can_exchange;
            std::optional<std::string> message;
            try {
              save_folder(path, kNewFolder, fs);
            } catch (const Error& e) {
              CHECK(e.status() == Status::kFile);
              message = e.what();
            }
            reached = fs.was_reached();
            if (fault == Fault::kDead) recover(path);
            INFO("operation " << k << ", errno " << error << ", " << message.value_or("no error"));
            const bool exists = folder_exists(path);
            std::set<std::string> names;
            for (const auto& entry : std::filesystem::directory_iterator(folder.path()))
              names.insert(entry.path().filename());
            CHECK(names == (exists ? std::set<std::string>{"step-7"} : std::set<std::string>{}));
            CHECK((exists || (message && !had_old)));
            if (exists) {
              const Tree tree = tree_of(path);
              CHECK((tree == kNewFolder || (message && had_old && tree == kOldFolder)));
              // Not known to be durable: the old one must be back, not removed.
              if (had_old && message && message->find("the folder of") != std::string::npos)
                CHECK((tree == kOldFolder || fault == Fault::kDead));
            }
            if (message) CHECK_THAT(*message, Contains("step-7") && Contains("; "));
          }
          CHECK(k >= 25);
        }
}

namespace {

// What a disk holds if power fails: names and data apart, each either written or made durable.
class PowerCutFileSystem : public FileSystem {
 public:
  PowerCutFileSystem(std::string root, const Tree& old) : root_(std::move(root)) {
    nodes_.resize(1);
    for (const auto& [name, bytes] : old) {  // folders come before what they hold
      const bool is_folder = name.back() == '/';
      const int node = add(root_ + "/" + (is_folder ? name.substr(0, name.size() - 1) : name));
      nodes_[node].data = nodes_[node].durable_data = bytes;
    }
    for (Node& node : nodes_) node.durable_names = node.names;
  }

  std::function<void()> after_each;

  int open(const char* path, int flags, mode_t mode) override {
    const int fd = FileSystem::open(path, flags, mode);
    if (fd >= 0) fds_[fd] = (flags & O_CREAT) ? add(path) : find(path);
    return done(fd);
  }
  ssize_t write(int fd, const void* data, size_t bytes) override {
    nodes_[fds_.at(fd)].data.append(static_cast<const char*>(data), bytes);
    done(0);
    return FileSystem::write(fd, data, bytes);
  }
  int sync(int fd) override {
    Node& node = nodes_[fds_.at(fd)];
    node.durable_data = node.data;
    node.durable_names = node.names;
    return done(0);
  }
  int rename(const char* from, const char* to) override {
    auto& source = parent(from).names;
    const int node = source.at(leaf(from));
    source.erase(leaf(from));
    parent(to).names[leaf(to)] = node;
    done(0);
    return FileSystem::rename(from, to);
  }
  int exchange(const char* a, const char* b) override {
    std::swap(parent(a).names.at(leaf(a)), parent(b).names.at(leaf(b)));
    done(0);
    return FileSystem::exchange(a, b);
  }
  int make_folder(const char* path) override {
    add(path);
    done(0);
    return FileSystem::make_folder(path);
  }
  int remove_file(const char* path) override { return remove(path, FileSystem::remove_file(path)); }
  int remove_folder(const char* path) override {
    return remove(path, FileSystem::remove_folder(path));
  }

  // The tree after a cut: names that were not made durable are lost or, with `keep_names`, were
  // written anyway; data that was not is always lost.
  Tree survivors(bool keep_names) const {
    Tree tree;
    collect(0, "", keep_names, tree);
    return tree;
  }

 private:
  struct Node {
    std::map<std::string, int> names, durable_names;
    std::string data, durable_data;
    bool is_folder = false;
  };

  static std::string leaf(const std::string& path) { return path.substr(path.rfind('/') + 1); }
  int find(const std::string& path) const {
    if (path == root_) return 0;
    return nodes_[find(path.substr(0, path.rfind('/')))].names.at(leaf(path));
  }
  Node& parent(const std::string& path) { return nodes_[find(path.substr(0, path.rfind('/')))]; }
  int add(const std::string& path) {
    const int node = static_cast<int>(nodes_.size());
    nodes_.emplace_back();
    parent(path).names[leaf(path)] = node;
    return node;
  }
  int remove(const std::string& path, int result) {
    if (result == 0) {  // the worst case: a removal reaches the disk at once
      parent(path).names.erase(leaf(path));
      parent(path).durable_names.erase(leaf(path));
    }
    return done(result);
  }
  int done(int result) {
    if (after_each) after_each();
    return result;
  }
  void collect(int node, const std::string& prefix, bool keep_names, Tree& tree) const {
    for (const auto& [name, child] : keep_names ? nodes_[node].names : nodes_[node].durable_names) {
      tree[prefix + name] = nodes_[child].durable_data;
      collect(child, prefix + name + "/", keep_names, tree);
    }
  }

  std::string root_;
  std::vector<Node> nodes_;
  std::map<int, int> fds_;
};

// What stands under `name`, folders by their files.
Tree below(const Tree& tree, const std::string& name) {
  Tree result;
  for (const auto& [path, bytes] : tree)
    if (path.starts_with(name + "/")) result[path.substr(name.size() + 1)] = bytes;
  return result;
}
Tree without_slashes(const Tree& tree) {
  Tree result;
  for (const auto& [name, bytes] : tree)
    result[name.back() == '/' ? name.substr(0, name.size() - 1) : name] = bytes;
  return result;
}

}  // namespace

TEST_CASE("file_io: a power cut after any operation leaves old or new", "[file_io]") {
  Tree old;
  for (const auto& [name, bytes] : kOldFolder) old["step-7/" + name] = bytes;
  old["step-7/"] = "";
  old["model.bin"] = "old";
  TempFolder folder;
  put_tree(folder.path(), old);
  PowerCutFileSystem fs(folder.path(), old);

  const Tree before = without_slashes(kOldFolder), after = without_slashes(kNewFolder);
  int operations = 0;
  fs.after_each = [&] {
    ++operations;
    for (const bool keep_names : {false, true}) {
      const Tree tree = fs.survivors(keep_names);
      const Tree saved = below(tree, "step-7");
      INFO("operation " << operations << ", names kept: " << keep_names);
      CHECK((saved == before || saved == after));
      CHECK((tree.at("model.bin") == "old" || tree.at("model.bin") == kLong));
    }
  };
  save_folder(folder / "step-7", kNewFolder, fs);
  CHECK(below(fs.survivors(false), "step-7") == after);  // what was reported as saved is durable
  write_file(folder / "model.bin", kLong, fs);
  CHECK(operations > 25);
  CHECK(fs.survivors(false).at("model.bin") == kLong);
}

TEST_CASE("file_io: leftovers of crashed saves are removed, strangers are not", "[file_io]") {
  TempFolder folder;
  const std::string path = folder / "ckpt";
  for (const std::string name : {".ckpt.tmp-1/unet/w", ".ckpt.tmp-99999", ".ckpt.old-5/config"}) {
    std::filesystem::create_directories(std::filesystem::path(folder / name).parent_path());
    put_bytes(folder / name, "stale");
  }
  put_bytes(folder / "outside", "kept");
  std::filesystem::create_symlink(folder / "outside", folder / ".ckpt.tmp-1/link");
  const Tree strangers = {{".ckpt.tmp-", ""},
                          {".ckpt.tmp-mine", ""},
                          {".ckpt2.tmp-1", ""},
                          {"ckpt.tmp-1", ""},
                          {"outside", "kept"}};
  put_tree(folder.path(), strangers);

  SECTION("an older content moved aside gets its name back") {
    recover(path);
    Tree expected = strangers;
    expected["ckpt/"] = "";
    expected["ckpt/config"] = "stale";
    CHECK(tree_of(folder.path()) == expected);
  }
  SECTION("unless a newer one stands there") {
    put_tree(path, {{"config", "good"}});
    recover(path + "/");
    Tree expected = strangers;
    expected["ckpt/"] = "";
    expected["ckpt/config"] = "good";
    CHECK(tree_of(folder.path()) == expected);
  }
  SECTION("a new save removes them") {
    save_folder(path, {{"config", "new"}}, FileSystem::real());
    Tree expected = strangers;
    expected["ckpt/"] = "";
    expected["ckpt/config"] = "new";
    CHECK(tree_of(folder.path()) == expected);
  }
  recover(folder / "absent/name");  // nothing to do
}

TEST_CASE("file_io: a folder needs its files committed", "[file_io]") {
  TempFolder folder;
  {
    OutputFolder out(folder / "out");
    OutputFile file = out.file("a/b");
    CHECK_THROWS_AS(out.commit(), Error);
    file.commit();
    CHECK_THAT(error_of(Status::kFile, [&] { out.file("a/b"); }),
               Contains(folder / "out/a/b") && Contains("File exists"));
  }
  CHECK(tree_of(folder.path()).empty());
  put_bytes(folder / "file", "");
  CHECK_THAT(error_of(Status::kFile, [&] { OutputFolder out(folder / "file"); }),
             Contains("it is a file"));
  make_folders(folder / "x/y/z/");
  make_folders(folder / "x/y/z");
  CHECK(folder_exists(folder / "x/y/z"));
  CHECK_THAT(error_of(Status::kFile, [&] { make_folders(folder / "file/z"); }),
             Contains("make the folder"));
}

TEST_CASE("file_io: appended lines are whole lines", "[file_io]") {
  TempFolder folder;
  const std::string path = folder / "metrics.jsonl";
  {
    AppendFile file(path);
    file.append_line("one");
    file.append_line("");
    CHECK(get_bytes(path) == "one\n\n");
    CHECK_THROWS_AS(file.append_line("a\nb"), Error);
  }
  put_bytes(path, "one\ntwo\n{\"step");  // a crash in mid-line
  AppendFile(path).append_line("three");
  CHECK(get_bytes(path) == "one\ntwo\nthree\n");
  put_bytes(path, std::string(10000, 'x'));
  AppendFile(path).append_line("1");
  CHECK(get_bytes(path) == "1\n");
  put_bytes(path, "a\n" + std::string(9000, 'x'));
  AppendFile(path).append_line("b");
  CHECK(get_bytes(path) == "a\nb\n");

  for (const Fault fault : {Fault::kOnce, Fault::kShort}) {  // operation 0 opens, 1 writes
    FaultyFileSystem fs(fault, 1, ENOSPC);
    AppendFile file(path, fs);
    CHECK_THAT(error_of(Status::kFile, [&] { file.append_line("lost"); }),
               Contains(path) && Contains("No space left"));
    const std::string content = get_bytes(path);
    // The take-back is itself the operation that fails after a short write.
    CHECK((fault == Fault::kShort ? content == "a\nb\nlo" : content == "a\nb\n"));
  }
  FaultyFileSystem drip(Fault::kNone, 0, 0);
  drip.longest_write = 2;
  AppendFile file(path, drip);  // drops "lo"
  CHECK_THAT(error_of(Status::kFile, [&] { file.append_line("lost"); }), Contains("No space left"));
  CHECK(get_bytes(path) == "a\nb\n");
  CHECK_THAT(error_of(Status::kFile, [&] { AppendFile file("/dev/full"); }), Contains("device"));
}
