#include "tools/npz.h"

#include <zip.h>

#include <catch2/catch.hpp>
#include <cstring>
#include <string>

#include "tests/data_files.h"

using namespace ddpm;
using namespace ddpm::test;
using namespace ddpm::tools;

namespace {

// The one member of an archive, read back by libzip, its CRC checked.
struct Member {
  std::string name;
  zip_uint16_t method = 0xFFFF;
  std::string bytes;
};

Member read_member(const std::string& path) {
  Member m;
  zip_t* archive = zip_open(path.c_str(), ZIP_RDONLY | ZIP_CHECKCONS, nullptr);
  if (!archive || zip_get_num_entries(archive, 0) != 1) return m;
  zip_stat_t info;
  zip_stat_index(archive, 0, 0, &info);
  m.name = info.name;
  m.method = info.comp_method;
  m.bytes.resize(info.size);
  zip_file_t* file = zip_fopen_index(archive, 0, 0);
  if (zip_fread(file, m.bytes.data(), m.bytes.size()) != static_cast<zip_int64_t>(info.size) ||
      zip_fclose(file) != 0)
    m.bytes.clear();
  zip_discard(archive);
  return m;
}

}  // namespace

TEST_CASE("write_npz: one stored numpy array", "[npz]") {
  TempFolder folder;
  for (const auto& [count, h, w, c] :
       {std::tuple{1, 1, 1, 1}, std::tuple{5, 4, 7, 3}, std::tuple{1000, 16, 16, 3}}) {
    std::vector<uint8_t> images(static_cast<size_t>(count) * h * w * c);
    for (size_t i = 0; i < images.size(); ++i) images[i] = static_cast<uint8_t>(i * 31 + i / 251);
    write_npz(folder / "a.npz", images.data(), count, h, w, c);

    const Member m = read_member(folder / "a.npz");
    CHECK(m.name == "arr_0.npy");
    CHECK(m.method == ZIP_CM_STORE);
    REQUIRE(m.bytes.size() > 10);
    CHECK(m.bytes.substr(0, 8) == std::string("\x93NUMPY\1\0", 8));
    const size_t data =
        10 + static_cast<uint8_t>(m.bytes[8]) + 256 * static_cast<uint8_t>(m.bytes[9]);
    CHECK(data % 64 == 0);
    REQUIRE(m.bytes.size() == data + images.size());
    const std::string text = m.bytes.substr(10, data - 10);
    const std::string shape = "(" + std::to_string(count) + ", " + std::to_string(h) + ", " +
                              std::to_string(w) + ", " + std::to_string(c) + ")";
    CHECK(text.find("{'descr': '|u1', 'fortran_order': False, 'shape': " + shape + ", }") == 0);
    CHECK(text.back() == '\n');
    CHECK(std::memcmp(m.bytes.data() + data, images.data(), images.size()) == 0);
  }
}

TEST_CASE("write_npz: equal images, equal bytes; replaces what was there", "[npz]") {
  TempFolder folder;
  const std::vector<uint8_t> images(48, 7);
  put_file(folder / "b.npz", std::vector<uint8_t>(10000, 'x'));
  write_npz(folder / "a.npz", images.data(), 4, 2, 2, 3);
  write_npz(folder / "b.npz", images.data(), 4, 2, 2, 3);
  const auto bytes = get_file(folder / "a.npz");
  CHECK(bytes == get_file(folder / "b.npz"));
  // The local header's time and date: 00:00 on 1980-01-01.
  CHECK(std::vector<uint8_t>(bytes.begin() + 10, bytes.begin() + 14) ==
        std::vector<uint8_t>{0, 0, 0x21, 0});
}

TEST_CASE("write_npz: a place that cannot be written", "[npz]") {
  TempFolder folder;
  const std::vector<uint8_t> images(12);
  const Thrown t = thrown_by([&] { write_npz(folder / "no/a.npz", images.data(), 1, 2, 2, 3); });
  CHECK(t.status == Status::kFile);
  CHECK(t.says("no/a.npz"));
}
