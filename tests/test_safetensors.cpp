#include "engine/safetensors.h"

#include <catch2/catch.hpp>
#include <chrono>
#include <cmath>
#include <cstring>
#include <functional>

#include "tests/temp_folder.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

using namespace ddpm;
using namespace ddpm::test;
using Catch::Matchers::Contains;
using Catch::Matchers::Equals;

namespace {

std::string length_of(uint64_t length) {
  return {reinterpret_cast<const char*>(&length), sizeof length};
}
std::string file_of(const std::string& header, size_t data_bytes = 0) {
  return length_of(header.size()) + header + std::string(data_bytes, '\x01');
}
std::string tensor(const std::string& name, const std::string& dtype, const std::string& shape,
                   const std::string& offsets) {
  return "\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":" + shape +
         ",\"data_offsets\":" + offsets + "}";
}
// A file of one tensor, `inner` being the content of its entry.
std::string entry(const std::string& inner, size_t data_bytes = 8) {
  return file_of("{\"t\":{" + inner + "}}", data_bytes);
}

// Empty where the bytes load, else the message; the status must be kFile.
std::string load_error(const TempFolder& folder, const std::string& bytes) {
  put_bytes(folder / "f", bytes);
  try {
    SafetensorsReader reader(folder / "f");
  } catch (const Error& e) {
    CHECK(e.status() == Status::kFile);
    CHECK_THAT(e.what(), Contains(folder / "f"));
    return e.what();
  }
  return {};
}

template <typename T>
std::string bytes_of(const std::vector<T>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
}

const std::string kSmallHeader = "{\"__metadata__\":{\"format\":\"pt\"}," +
                                 tensor("a.b", "F32", "[2]", "[0,8]") + "," +
                                 tensor("c", "U8", "[1,3]", "[8,11]") + "}     ";
const std::string kSmall = length_of(kSmallHeader.size()) + kSmallHeader + "12345678abc";

}  // namespace

TEST_CASE("safetensors: a small file reads as written by hand", "[safetensors]") {
  TempFolder folder;
  put_bytes(folder / "f", kSmall);
  const SafetensorsReader reader(folder / "f");
  REQUIRE(reader.tensors().size() == 2);
  const TensorInfo& a = reader.tensors()[0];
  CHECK(a.name == "a.b");
  CHECK(a.dtype == "F32");
  CHECK(a.shape == std::vector<uint64_t>{2});
  CHECK(a.elements == 2);
  CHECK(a.offset == 8 + kSmallHeader.size());
  CHECK(a.bytes == 8);
  const TensorInfo* c = reader.find("c");
  REQUIRE(c == &reader.tensors()[1]);
  CHECK(c->shape == std::vector<uint64_t>{1, 3});
  std::string text(3, ' ');
  reader.read(*c, text.data());
  CHECK(text == "abc");
  reader.read(*c, 1, 2, text.data());
  CHECK(text == "bcc");
  CHECK_THROWS_AS(reader.read(*c, 2, 2, text.data()), Error);
  CHECK_THROWS_AS(reader.read(*c, 4, 0, text.data()), Error);
  CHECK(reader.find("a") == nullptr);
  CHECK(reader.find("zz") == nullptr);
  CHECK(reader.find("") == nullptr);
  CHECK(reader.metadata() == std::map<std::string, std::string>{{"format", "pt"}});
  try {
    SafetensorsReader absent(folder / "absent", Status::kConfig);
    FAIL();
  } catch (const Error& e) {
    CHECK(e.status() == Status::kConfig);
  }
}

TEST_CASE("safetensors: unusual but sound files load", "[safetensors]") {
  TempFolder folder;
  const std::string good[] = {
      file_of("{}"),
      file_of("{}      "),
      file_of("{ \"__metadata__\" : { } }"),
      file_of("{\n\t" + tensor("t", "F32", "[ 2 ]", "[0, 8]") + "\r\n}", 8),
      file_of("{" + tensor("scalar", "F64", "[]", "[0,8]") + "}", 8),
      file_of("{" + tensor("empty", "F32", "[0]", "[0,0]") + "}"),
      file_of("{" + tensor("empty", "F32", "[3,0,5]", "[0,0]") + "}"),
      file_of("{" + tensor("z", "U8", "[0]", "[4,4]") + "," + tensor("y", "U8", "[4]", "[0,4]") +
                  "," + tensor("x", "U8", "[0]", "[0,0]") + "," +
                  tensor("w", "U8", "[0]", "[4,4]") + "}",
              4),
      file_of("{" + tensor("second", "U8", "[4]", "[4,8]") + "," +
                  tensor("first", "I32", "[1]", "[0,4]") + "}",
              8),
      file_of("{" + tensor("t", "F4", "[2,3]", "[0,3]") + "}", 3),
      file_of("{" + tensor("t", "F6_E2M3", "[4]", "[0,3]") + "}", 3),
      file_of("{" + tensor("t", "U8", "[1,1,1,1,1,1,1,2]", "[0,2]") + "}", 2),
      file_of("{" + tensor(std::string(256, 'n'), "U8", "[1]", "[0,1]") + "}", 1),
      file_of("{" + tensor("\xC3\xBC \\u00fc \\\"", "U8", "[1]", "[0,1]") + "}", 1),
      entry(R"("data_offsets":[0,8],"shape":[1],"dtype":"I64")"),
      file_of("{\"__metadata__\":{\"a\":\"\",\"dtype\":\"\\n\"}," +
                  tensor("t", "U8", "[1]", "[0,1]") + "}",
              1),
  };
  for (const std::string& bytes : good) {
    INFO(bytes.substr(8));
    CHECK_THAT(load_error(folder, bytes), Equals(""));
  }
  for (const std::string dtype :
       {"BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I16",
        "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64"}) {
    const bool wide = dtype == "C64" || dtype.ends_with("64");
    const size_t width = wide ? 8 : dtype.ends_with("32") ? 4 : dtype.ends_with("16") ? 2 : 1;
    const std::string offsets = "[0," + std::to_string(width * 3) + "]";
    CHECK_THAT(
        load_error(folder, file_of("{" + tensor("t", dtype, "[3]", offsets) + "}", width * 3)),
        Equals(""));
    const SafetensorsReader reader(folder / "f");
    char data[24];
    const std::string known = "F32 F64 F16 BF16 U8 I32 I64 ";
    if (known.find(dtype + " ") != std::string::npos)
      CHECK_NOTHROW(reader.read(reader.tensors()[0], data));
    else
      CHECK_THROWS_WITH(reader.read(reader.tensors()[0], data), Contains("has dtype " + dtype));
    float values[3];
    if (dtype.starts_with("F8") || !(dtype.starts_with("F") || dtype == "BF16"))
      CHECK_THROWS_WITH(reader.read_f32(reader.tensors()[0], values),
                        Contains("has dtype " + dtype));
    else
      CHECK_NOTHROW(reader.read_f32(reader.tensors()[0], values));
  }
}

TEST_CASE("safetensors: bad files are rejected with their reason", "[safetensors]") {
  using namespace std::string_literals;
  struct Bad {
    std::string bytes, part;
  };
  const std::string sound = tensor("t", "F32", "[2]", "[0,8]");
  const std::string u8 = tensor("u", "U8", "[4]", "[8,12]");
  const Bad bad[] = {
      // The length and the frame.
      {"", "0 bytes are too few"},
      {"1234567", "7 bytes are too few"},
      {length_of(0), "not between 2 and"},
      {length_of(1) + "{", "not between 2 and"},
      {length_of(2), "beyond the file's end"},
      {length_of(3) + "{}", "beyond the file's end"},
      {length_of(100000001) + "{}", "not between 2 and"},
      {length_of((16 << 20) + 1) + "{}", "not between 2 and"},
      {length_of(UINT64_MAX) + "{}", "not between 2 and"},
      {length_of(UINT64_MAX - 7) + "{}", "not between 2 and"},
      {length_of(uint64_t{1} << 63) + "{}", "not between 2 and"},
      {file_of(" {}"), "does not start with '{'"},
      {file_of("\n{}"), "does not start with '{'"},
      {file_of("[]"), "does not start with '{'"},
      {file_of("\xEF\xBB\xBF{}"), "does not start with '{'"},
      {file_of("  "), "does not start with '{'"},
      {file_of("{}x"), "invalid literal"},
      {file_of("{}{}"), "byte 11"},
      {file_of("{}\0"s), "a NUL byte"},
      {file_of("{}", 1), "1 bytes stand behind its last tensor"},
      {file_of("{" + sound + "}", 9), "1 bytes stand behind its last tensor"},
      {file_of("{" + sound + "}", 7), "up to byte 8, but the file has 7"},
      {file_of("{" + sound + "}", 0), "up to byte 8, but the file has 0"},
      // Other kinds of file.
      {"PK\x03\x04\x14\0\0\0\x08\0\0\0\0\0\0\0"s + std::string(100, 'x'), "convert it in Python"},
      {"PK\x03\x04", "convert it in Python"},
      {"\x80\x02\x8a\x0al\xfc\x9c\x46\xf9 j\xa8P\x19."s, "convert it in Python"},
      {"\x80\x04\x95\x10\0\0\0\0\0\0\0}"s, "convert it in Python"},
      {"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"},
      {"<!DOCTYPE html><html></html>", "not between 2 and"},
      {"GGUF\x03\0\0\0\0\0\0\0"s, "not between 2 and"},
      // JSON.
      {file_of("{" + sound), "unexpected end of input"},
      {file_of("{" + sound + ",}", 8), "object key"},
      {file_of("{\"\xFF\":{}}"), "ill-formed UTF-8"},
      {file_of("{\"t\xC0\x80\":{}}"), "ill-formed UTF-8"},
      {file_of("{\"__metadata__\":{\"a\":\"\xED\xA0\x80\"}}"), "ill-formed UTF-8"},
      {file_of("{\"t\":" + std::string(1000, '[') + "}"), "a list where the object"},
      {file_of("{\"t\":" + std::string(1000, '{')), "object key"},
      {entry("\"shape\":" + std::string(100000, '[')), "a list where the shape"},
      {entry(R"("shape":[{"a":1}])"), "an object where the shape"},
      {file_of("{\"t\":null}"), "null where the object of tensor \"t\""},
      {file_of("{\"t\":[]}"), "a list where the object"},
      {file_of("{\"t\":7}"), "a number where the object"},
      {file_of("{\"t\":\"x\"}"), "a string where the object"},
      {file_of("{\"t\":{}}"), "lacks dtype, shape or data_offsets"},
      // Fields of a tensor.
      {entry(R"("dtype":"F32","shape":[2])"), "lacks"},
      {entry(R"("dtype":"F32","data_offsets":[0,8])"), "lacks"},
      {entry(R"("shape":[2],"data_offsets":[0,8])"), "lacks"},
      {entry(R"("dtype":"F32","shape":[2],"data_offsets":[0,8],"x":1)"),
       "unknown field \"x\" of tensor \"t\""},
      {entry(R"("dtype":"F32","shape":[2],"data_offsets":[0,8],"strides":[1])"),
       "unknown field \"strides\""},
      {entry(R"("dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8])"),
       "\"dtype\" of tensor \"t\" stands twice"},
      {entry(R"("dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8])"),
       "\"shape\" of tensor \"t\" stands twice"},
      {entry(R"("dtype":"F32","shape":[2],"data_offsets":[0,8],"data_offsets":[0,8])"),
       "stands twice"},
      {entry(R"("dtype":"F33","shape":[2],"data_offsets":[0,8])"), "unknown dtype \"F33\""},
      {entry(R"("dtype":"f32","shape":[2],"data_offsets":[0,8])"), "unknown dtype \"f32\""},
      {entry(R"("dtype":"","shape":[2],"data_offsets":[0,8])"), "unknown dtype"},
      {entry(R"("dtype":4,"shape":[2],"data_offsets":[0,8])"), "a number where the dtype"},
      {entry(R"("dtype":null,"shape":[2],"data_offsets":[0,8])"), "null where the dtype"},
      {entry(R"("dtype":["F32"],"shape":[2],"data_offsets":[0,8])"), "a list where the dtype"},
      {entry(R"("dtype":"F32","shape":2,"data_offsets":[0,8])"), "a number where the shape"},
      {entry(R"("dtype":"F32","shape":"2","data_offsets":[0,8])"), "a string where the shape"},
      {entry(R"("dtype":"F32","shape":["2"],"data_offsets":[0,8])"), "a string where the shape"},
      {entry(R"("dtype":"F32","shape":[-2],"data_offsets":[0,8])"),
       "a negative number where the shape"},
      {entry(R"("dtype":"F32","shape":[2.0],"data_offsets":[0,8])"),
       "a point or exponent where the shape"},
      {entry(R"("dtype":"F32","shape":[2e0],"data_offsets":[0,8])"), "a point or exponent"},
      {entry(R"("dtype":"F32","shape":[true],"data_offsets":[0,8])"), "true or false where"},
      {entry(R"("dtype":"F32","shape":[null],"data_offsets":[0,8])"), "null where"},
      {entry(R"("dtype":"F32","shape":[[2]],"data_offsets":[0,8])"), "a list where"},
      {entry(R"("dtype":"F32","shape":[1,1,1,1,1,1,1,1,2],"data_offsets":[0,8])"),
       "more than 8 dimensions"},
      {entry(R"("dtype":"F32","shape":[18446744073709551618],"data_offsets":[0,8])"),
       "more than 19 digits"},
      {entry(R"("dtype":"F32","shape":[99999999999999999999999999],"data_offsets":[0,8])"),
       "more than 19 digits"},
      {entry(R"("dtype":"F32","shape":[2],"data_offsets":[0])"), "not two data_offsets"},
      {entry(R"("dtype":"F32","shape":[2],"data_offsets":[])"), "not two data_offsets"},
      {entry(R"("dtype":"F32","shape":[2],"data_offsets":[0,8,8])"), "a third number"},
      {entry(R"("dtype":"F32","shape":[2],"data_offsets":8)"), "a number where the data_offsets"},
      {entry(R"("dtype":"F32","shape":[2],"data_offsets":{"a":0})"),
       "an object where the data_offsets"},
      {entry(R"("dtype":"F32","shape":[2],"data_offsets":[8,0])"), "ends before it begins"},
      {entry(R"("dtype":"F32","shape":[2],"data_offsets":[-8,0])"), "a negative number"},
      {entry(R"("dtype":"F32","shape":[2],"data_offsets":[0.0,8.0])"), "a point or exponent"},
      {entry(R"("dtype":"F32","shape":[2],"data_offsets":[0,18446744073709551615])"),
       "more than 19 digits"},
      {entry(R"("dtype":"F32","shape":[2],"data_offsets":["0","8"])"),
       "a string where the data_offsets"},
      // Sizes.
      {entry(R"("dtype":"F32","shape":[3],"data_offsets":[0,8])"),
       "needs 96 bits, its data_offsets hold 8"},
      {entry(R"("dtype":"F32","shape":[],"data_offsets":[0,8])"), "needs 32 bits"},
      {entry(R"("dtype":"F32","shape":[0],"data_offsets":[0,8])"), "needs 0 bits"},
      {entry(R"("dtype":"F64","shape":[2],"data_offsets":[0,8])"), "needs 128 bits"},
      {entry(R"("dtype":"F4","shape":[3],"data_offsets":[0,1])", 1), "needs 12 bits"},
      {entry(R"("dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0])", 0),
       "too large for any file"},
      {entry(R"("dtype":"F32","shape":[4294967296,4294967296,0],"data_offsets":[0,0])", 0),
       "too large for any file"},
      {entry(R"("dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0])", 0),
       "too large for any file"},
      {entry(R"("dtype":"F64","shape":[2305843009213693952],"data_offsets":[0,0])", 0),
       "too large for any file"},
      {entry(R"("dtype":"F32","shape":[2147483648,2,2147483648,2],"data_offsets":[0,0])", 0),
       "too large for any file"},
      {entry(R"("dtype":"F32","shape":[274877906944],"data_offsets":[0,1099511627776])"),
       "up to byte 1099511627776, but the file has 8"},
      {entry(
           R"("dtype":"U8","shape":[1152921504606846976],"data_offsets":[0,1152921504606846976])"),
       "but the file has 8"},
      {entry(
           R"("dtype":"U8","shape":[9],"data_offsets":[9223372036854775800,9223372036854775809])"),
       "but 0 is next"},
      // Layout.
      {file_of("{" + tensor("t", "F32", "[1]", "[4,8]") + "}", 8),
       "begins at byte 4 of the data, but 0 is next"},
      {file_of("{" + sound + "," + tensor("u", "U8", "[4]", "[9,13]") + "}", 13),
       "begins at byte 9 of the data, but 8 is next"},
      {file_of("{" + sound + "," + tensor("u", "U8", "[4]", "[4,8]") + "}", 8),
       "begins at byte 4 of the data, but 8 is next"},
      {file_of("{" + sound + "," + tensor("u", "F32", "[2]", "[0,8]") + "}", 8),
       "begins at byte 0 of the data, but 8 is next"},
      {file_of("{" + sound + "," + tensor("u", "U8", "[0]", "[4,4]") + "}", 8), "begins at byte 4"},
      {file_of("{" + sound + "," + tensor("u", "U8", "[0]", "[9,9]") + "}", 8), "begins at byte 9"},
      {file_of("{" + sound + "," + u8 + "," + tensor("t", "U8", "[1]", "[12,13]") + "}", 13),
       "tensor \"t\" stands twice"},
      {file_of("{" + sound + "," + tensor("\\u0074", "U8", "[4]", "[8,12]") + "}", 12),
       "tensor \"t\" stands twice"},
      {file_of("{" + sound + "," + sound + "}", 8), "begins at byte 0"},
      // A zip archive behind, or hidden between, sound tensors.
      {file_of("{" + sound + "}", 8) + "PK\x05\x06" + std::string(18, '\0'),
       "22 bytes stand behind"},
      {file_of("{" + sound + "," + tensor("u", "U8", "[4]", "[30,34]") + "}", 34), "but 8 is next"},
      // Names.
      {file_of("{" + tensor("", "F32", "[2]", "[0,8]") + "}", 8), "has not 1 to 256 bytes"},
      {file_of("{" + tensor(std::string(257, 'n'), "F32", "[2]", "[0,8]") + "}", 8),
       "has not 1 to 256 bytes"},
      {file_of("{" + tensor("a\\nb", "F32", "[2]", "[0,8]") + "}", 8), "control character"},
      {file_of("{" + tensor("a\x7f", "F32", "[2]", "[0,8]") + "}", 8), "control character"},
      {file_of("{" + tensor("a\xC2\x9B", "F32", "[2]", "[0,8]") + "}", 8), "control character"},
      {file_of("{" + tensor("a\\u0000", "F32", "[2]", "[0,8]") + "}", 8), "a NUL character"},
      {file_of("{" + tensor("../../x", "F32", "[2]", "[0,8]") + "}", 8), "looks like a path"},
      {file_of("{" + tensor("/etc/passwd", "F32", "[2]", "[0,8]") + "}", 8), "looks like a path"},
      {file_of("{" + tensor("a\\\\b", "F32", "[2]", "[0,8]") + "}", 8), "looks like a path"},
      // Metadata.
      {file_of("{\"__metadata__\":{\"a\":1}}"), "a number where the string of \"a\""},
      {file_of("{\"__metadata__\":{\"a\":null}}"), "null where the string of \"a\""},
      {file_of("{\"__metadata__\":{\"a\":{}}}"), "an object where the string of \"a\""},
      {file_of("{\"__metadata__\":{\"a\":[]}}"), "a list where the string of \"a\""},
      {file_of("{\"__metadata__\":\"a\"}"), "a string where the object of __metadata__"},
      {file_of("{\"__metadata__\":[]}"), "a list where the object of __metadata__"},
      {file_of("{\"__metadata__\":null}"), "null where the object of __metadata__"},
      {file_of("{\"__metadata__\":{\"a\":\"\",\"a\":\"\"}}"), "\"a\" stands twice"},
      {file_of("{\"__metadata__\":{},\"__metadata__\":{}}"), "__metadata__ stands twice"},
  };
  TempFolder folder;
  for (const Bad& b : bad) {
    INFO(b.bytes.substr(0, 200));
    CHECK_THAT(load_error(folder, b.bytes), Contains(b.part));
  }
  CHECK(sizeof bad / sizeof bad[0] > 110);
  for (const std::string& good :
       {file_of("{" + sound + "}", 8), file_of("{" + sound + "," + u8 + "}", 12),
        entry(R"("dtype":"F32","shape":[2],"data_offsets":[0,8])")})
    CHECK_THAT(load_error(folder, good), Equals(""));
}

TEST_CASE("safetensors: hostile headers of full size are rejected soon", "[safetensors]") {
  TempFolder folder;
  constexpr size_t kMax = size_t{16} << 20;
  const auto repeat = [](size_t bytes, std::string header,
                         const std::function<std::string(size_t)>& next) {
    for (size_t i = 0; header.size() < bytes; ++i) header += next(i);
    return header;
  };
  struct Bad {
    std::string header, part;
  };
  const Bad bad[] = {
      {"{\"" + std::string(kMax - 2, 'x'), "a string, number or gap of more than"},
      {"{" + std::string(kMax - 2, ' ') + "}", "a string, number or gap of more than"},
      {"{\"t\":" + std::string(kMax - 6, '9') + "}", "a string, number or gap of more than"},
      {"{\"t\":{\"shape\":[" + repeat(1000, "", [](size_t) { return "1,"; }),
       "more than 8 dimensions"},
      {repeat(size_t{2} << 20, "{\"__metadata__\":{\"a\":\"\"",
              [](size_t i) { return ",\"" + std::to_string(i) + "\":\"\""; }),
       "more than 65536 entries"},
      {repeat(size_t{5} << 20, "{" + tensor("t", "U8", "[0]", "[0,0]"),
              [](size_t i) { return "," + tensor(std::to_string(i), "U8", "[0]", "[0,0]"); }),
       "more than 65536 tensors"},
      {repeat(kMax / 4, "{" + tensor("t", "U8", "[0]", "[0,0]"),
              [](size_t i) {
                const std::string name = std::to_string(i);
                return "," + tensor(std::string(250 - name.size(), 'n') + name, "U8",
                                    "[0,1,1,1,1,1,1,1]", "[0,0]");
              }) +
           "}",
       "1 bytes stand behind"},
  };
  for (const Bad& b : bad) {
    const auto start = std::chrono::steady_clock::now();
    CHECK_THAT(load_error(folder, file_of(b.header, 1)), Contains(b.part));
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    CHECK(seconds.count() < 10);  // under 1 s without a sanitizer
  }
}

TEST_CASE("safetensors: every truncation is rejected, every header bit flip is harmless",
          "[safetensors]") {
  TempFolder folder;
  const std::string& bytes = kSmall;
  const size_t header = kSmallHeader.size();
  REQUIRE_THAT(load_error(folder, bytes), Equals(""));
  for (size_t n = 0; n < bytes.size(); ++n) {
    INFO("cut to " << n << " bytes");
    CHECK_THAT(load_error(folder, bytes.substr(0, n)), Contains("; "));
  }
  CHECK_THAT(load_error(folder, bytes + "x"), Contains("stand behind"));

  int accepted = 0;
  for (size_t bit = 0; bit < (8 + header) * 8; ++bit) {
    std::string flipped = bytes;
    flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ (1 << bit % 8));
    if (!load_error(folder, flipped).empty()) continue;
    ++accepted;  // a letter of a name, of the metadata, or a type of the same width
    const SafetensorsReader reader(folder / "f");
    uint64_t end = 8 + header;
    for (const TensorInfo& t : reader.tensors()) {
      CHECK(t.offset == end);
      end += t.bytes;
      CHECK(t.bytes == t.elements * (t.name == "c" || t.bytes == 3 ? 1 : 4));
      CHECK(reader.find(t.name) == &t);
      std::vector<char> data(t.bytes);
      if (t.dtype != "U32") reader.read(t, data.data());
    }
    CHECK(end == bytes.size());
  }
  CHECK(accepted > 0);
  CHECK(accepted < 300);
}

TEST_CASE("safetensors: values convert to fp32", "[safetensors]") {
  TempFolder folder;
  const auto read = [&](const std::string& dtype, size_t count, const std::string& data) {
    const std::string header = "{" +
                               tensor("t", dtype, "[" + std::to_string(count) + "]",
                                      "[0," + std::to_string(data.size()) + "]") +
                               "}";
    put_bytes(folder / "f", length_of(header.size()) + header + data);
    const SafetensorsReader reader(folder / "f");
    std::vector<float> values(count);
    reader.read_f32(*reader.find("t"), values.data());
    return values;
  };
  std::vector<uint16_t> all(65536);
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<uint16_t>(i);
  // Independent truth: sign, exponent and fraction by their definition, in double.
  const auto truth = [](unsigned bits, int exponent_bits, int fraction_bits) {
    const int bias = (1 << (exponent_bits - 1)) - 1;
    const int exponent = static_cast<int>(bits >> fraction_bits) & ((1 << exponent_bits) - 1);
    const double fraction = static_cast<double>(bits & ((1u << fraction_bits) - 1));
    const double sign = bits >> 15 ? -1.0 : 1.0;
    if (exponent == (1 << exponent_bits) - 1) return fraction == 0 ? sign * INFINITY : std::nan("");
    const double significand = std::ldexp(fraction, -fraction_bits) + (exponent > 0 ? 1 : 0);
    return sign * std::ldexp(significand, std::max(exponent, 1) - bias);
  };
  const std::vector<float> half = read("F16", all.size(), bytes_of(all));
  const std::vector<float> bf16 = read("BF16", all.size(), bytes_of(all));
  int wrong = 0;
  for (unsigned i = 0; i < 65536; ++i)
    for (const auto& [value, expected] :
         {std::pair{half[i], truth(i, 5, 10)}, {bf16[i], truth(i, 8, 7)}})
      wrong += std::isnan(expected)
                   ? !std::isnan(value)
                   : value != expected || std::signbit(value) != std::signbit(expected);
  CHECK(wrong == 0);

  const std::vector<double> doubles = {0.0, -0.0, 1.0 / 3, 1e300, -1e300, 1e-320, INFINITY, 1e-40};
  const std::vector<float> floats = read("F64", doubles.size(), bytes_of(doubles));
  CHECK(floats ==
        std::vector<float>{0.0f, -0.0f, 1.0f / 3, INFINITY, -INFINITY, 0.0f, INFINITY, 1e-40f});
  const std::vector<float> same = {1.5f, -2e-40f};
  CHECK(read("F32", 2, bytes_of(same)) == same);
  // More than one chunk.
  std::vector<double> many(300001);
  for (size_t i = 0; i < many.size(); ++i) many[i] = static_cast<double>(i);
  const std::vector<float> read_many = read("F64", many.size(), bytes_of(many));
  CHECK(std::equal(many.begin(), many.end(), read_many.begin()));
}

TEST_CASE("safetensors: the writer's bytes are the format's", "[safetensors]") {
  TempFolder folder;
  const std::vector<float> f = {1, 2, 3};
  const std::vector<int64_t> i = {-1};
  const std::vector<uint8_t> u = {7, 8};
  const std::vector<uint16_t> h = {0x3F80};
  const std::vector<int32_t> n = {5};
  const auto write = [&](std::vector<TensorSource> tensors,
                         const std::map<std::string, std::string>& metadata) {
    OutputFile file(folder / "f");
    const auto hashes = write_safetensors(file, std::move(tensors), metadata);
    file.commit();
    return hashes;
  };
  std::vector<TensorSource> tensors = {tensor_in_memory("u", DType::kU8, {2, 1}, u.data()),
                                       tensor_in_memory("b", DType::kF32, {1, 2}, f.data()),
                                       tensor_in_memory("h", DType::kBF16, {}, h.data()),
                                       tensor_in_memory("empty", DType::kF32, {0, 3}, nullptr),
                                       tensor_in_memory("a.weight", DType::kF32, {3}, f.data()),
                                       tensor_in_memory("n", DType::kI32, {1}, n.data()),
                                       tensor_in_memory("quote\"", DType::kI64, {1}, i.data())};
  const auto hashes = write(tensors, {{"format", "pt"}});
  std::string header = R"({"__metadata__":{"format":"pt"},)"
                       R"("quote\"":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},)"
                       R"("a.weight":{"dtype":"F32","shape":[3],"data_offsets":[8,20]},)"
                       R"("b":{"dtype":"F32","shape":[1,2],"data_offsets":[20,28]},)"
                       R"("empty":{"dtype":"F32","shape":[0,3],"data_offsets":[28,28]},)"
                       R"("n":{"dtype":"I32","shape":[1],"data_offsets":[28,32]},)"
                       R"("h":{"dtype":"BF16","shape":[],"data_offsets":[32,34]},)"
                       R"("u":{"dtype":"U8","shape":[2,1],"data_offsets":[34,36]}})";
  while (header.size() % 8 != 0) header += ' ';
  const std::string expected = length_of(header.size()) + header + bytes_of(i) + bytes_of(f) +
                               bytes_of(f).substr(0, 8) + bytes_of(n) + bytes_of(h) + bytes_of(u);
  CHECK(get_bytes(folder / "f") == expected);

  std::reverse(tensors.begin(), tensors.end());
  CHECK(write(tensors, {{"format", "pt"}}) == hashes);
  CHECK(get_bytes(folder / "f") == expected);

  const SafetensorsReader reader(folder / "f");
  CHECK(reader.tensors().size() == tensors.size());
  for (const TensorSource& t : tensors) {
    INFO(t.name);
    const TensorInfo* info = reader.find(t.name);
    REQUIRE(info != nullptr);
    CHECK(info->dtype == name_of(t.dtype));
    CHECK(info->shape == t.shape);
    CHECK(reader.hash(*info) == hashes.at(t.name));
  }
  CHECK(hashes.at("empty") == "2d06800538d394c2");  // XXH3-64 of nothing, as published
  write({}, {});
  CHECK(get_bytes(folder / "f") == length_of(8) + "{}      ");

  OutputFile file(folder / "g");
  const auto one = [&](const std::string& name) {
    return tensor_in_memory(name, DType::kU8, {2}, u.data());
  };
  CHECK_THROWS_AS(write_safetensors(file, {one("a/b")}), Error);
  CHECK_THROWS_AS(write_safetensors(file, {one("__metadata__")}), Error);
  CHECK_THROWS_AS(write_safetensors(file, {one("a"), one("a")}), Error);
}

TEST_CASE("safetensors: large tensors stream in pieces, and any flipped bit changes the hash",
          "[safetensors]") {
  TempFolder folder;
  std::vector<uint32_t> values(700001);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<uint32_t>(i * 2654435761u);
  const std::string data = bytes_of(values);
  uint64_t next = 0;
  size_t longest = 0;
  TensorSource source{"t", DType::kI32, {values.size()}, [&](uint64_t at, void* to, size_t bytes) {
                        CHECK(at == next);
                        next = at + bytes;
                        longest = std::max(longest, bytes);
                        std::memcpy(to, data.data() + at, bytes);
                      }};
  std::map<std::string, std::string> hashes;
  {
    OutputFile file(folder / "f");
    hashes = write_safetensors(file, {source});
    file.commit();
  }
  CHECK(next == data.size());
  CHECK(longest <= (1u << 20));
  char expected[17];
  std::snprintf(expected, sizeof expected, "%016llx",
                static_cast<unsigned long long>(XXH3_64bits(data.data(), data.size())));
  CHECK(hashes.at("t") == expected);
  const SafetensorsReader reader(folder / "f");
  std::string back(data.size(), '\0');
  reader.read(reader.tensors()[0], back.data());
  CHECK(back == data);
  CHECK(reader.hash(reader.tensors()[0]) == expected);

  std::string bytes = get_bytes(folder / "f");
  for (size_t k = 0; k < 20; ++k) {
    std::string flipped = bytes;
    const size_t bit = (data.size() * 8 - 1) * k / 19;
    char& byte = flipped[flipped.size() - data.size() + bit / 8];
    byte = static_cast<char>(byte ^ (1 << bit % 8));
    put_bytes(folder / "g", flipped);
    const SafetensorsReader damaged(folder / "g");
    CHECK(damaged.hash(damaged.tensors()[0]) != expected);
  }
}
