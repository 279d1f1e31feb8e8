#include "tools/image_io.h"

#include <jpeglib.h>
#include <png.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <cstdlib>
#include <cstring>

#include "tests/data_files.h"

using namespace ddpm;
using namespace ddpm::test;
using namespace ddpm::tools;

namespace {

using Bytes = std::vector<uint8_t>;

Image pattern(int h, int w, int c) {
  Image image = make_image(h, w, c);
  for (size_t i = 0; i < image.pixels.size(); ++i)
    image.pixels[i] = static_cast<uint8_t>(i * i * 29 + i * 53 + 11);
  return image;
}

// A PNG of any kind by libpng; `rows` are packed as the file stores them. Errors end the test.
struct PngKind {
  int h, w, bits, type;
  bool interlaced = false;
  std::vector<png_color> palette = {};
  Bytes alpha = {};  // of the palette's entries
};

Bytes make_png(const PngKind& kind, Bytes rows) {
  Bytes out;
  png_structp png = png_create_write_struct(PNG_LIBPNG_VER_STRING, nullptr, nullptr, nullptr);
  png_infop info = png_create_info_struct(png);
  if (setjmp(png_jmpbuf(png))) std::abort();
  png_set_write_fn(
      png, &out,
      [](png_structp p, png_bytep data, size_t n) {
        auto* to = static_cast<Bytes*>(png_get_io_ptr(p));
        to->insert(to->end(), data, data + n);
      },
      nullptr);
  png_set_IHDR(png, info, static_cast<png_uint_32>(kind.w), static_cast<png_uint_32>(kind.h),
               kind.bits, kind.type, kind.interlaced ? PNG_INTERLACE_ADAM7 : PNG_INTERLACE_NONE,
               PNG_COMPRESSION_TYPE_DEFAULT, PNG_FILTER_TYPE_DEFAULT);
  if (!kind.palette.empty())
    png_set_PLTE(png, info, kind.palette.data(), static_cast<int>(kind.palette.size()));
  if (!kind.alpha.empty())
    png_set_tRNS(png, info, kind.alpha.data(), static_cast<int>(kind.alpha.size()), nullptr);
  png_write_info(png, info);
  std::vector<png_bytep> pointers;
  for (int y = 0; y < kind.h; ++y)
    pointers.push_back(rows.data() + rows.size() / static_cast<size_t>(kind.h) * y);
  png_write_image(png, pointers.data());
  png_write_end(png, info);
  png_destroy_write_struct(&png, &info);
  return out;
}

uint32_t crc32(const uint8_t* data, size_t size) {
  uint32_t crc = ~0u;
  for (size_t i = 0; i < size; ++i) {
    crc ^= data[i];
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0u);
  }
  return ~crc;
}

void append_u32(Bytes& to, uint32_t v) {
  for (int shift = 24; shift >= 0; shift -= 8) to.push_back(static_cast<uint8_t>(v >> shift));
}

Bytes png_chunk(const char* type, const Bytes& data) {
  Bytes chunk;
  append_u32(chunk, static_cast<uint32_t>(data.size()));
  chunk.insert(chunk.end(), type, type + 4);
  chunk.insert(chunk.end(), data.begin(), data.end());
  append_u32(chunk, crc32(chunk.data() + 4, chunk.size() - 4));
  return chunk;
}

// `png` with a chunk put between its header (8 + 25 bytes) and what follows.
Bytes with_chunk(const Bytes& png, const Bytes& chunk) {
  Bytes out(png.begin(), png.begin() + 33);
  out.insert(out.end(), chunk.begin(), chunk.end());
  out.insert(out.end(), png.begin() + 33, png.end());
  return out;
}

// `png` with another size in its header, checksum included.
Bytes with_size(Bytes png, uint32_t w, uint32_t h) {
  Bytes sizes;
  append_u32(sizes, w);
  append_u32(sizes, h);
  std::copy(sizes.begin(), sizes.end(), png.begin() + 16);
  Bytes crc;
  append_u32(crc, crc32(png.data() + 12, 17));
  std::copy(crc.begin(), crc.end(), png.begin() + 29);
  return png;
}

enum class Scans { kOne, kProgressive, kPerCoefficient };

Bytes make_jpeg(const Image& image, Scans scans = Scans::kOne, bool cmyk = false) {
  jpeg_compress_struct info = {};
  jpeg_error_mgr errors = {};
  info.err = jpeg_std_error(&errors);  // its error_exit ends the program
  jpeg_create_compress(&info);
  unsigned char* buffer = nullptr;
  unsigned long size = 0;
  jpeg_mem_dest(&info, &buffer, &size);
  info.image_width = static_cast<JDIMENSION>(image.w);
  info.image_height = static_cast<JDIMENSION>(image.h);
  info.input_components = image.c;
  info.in_color_space = cmyk ? JCS_CMYK : image.c == 1 ? JCS_GRAYSCALE : JCS_RGB;
  jpeg_set_defaults(&info);
  jpeg_set_quality(&info, 95, TRUE);
  if (scans == Scans::kProgressive) jpeg_simple_progression(&info);
  std::vector<jpeg_scan_info> script;
  if (scans == Scans::kPerCoefficient) {
    script.push_back({image.c, {0, 1, 2, 0}, 0, 0, 0, 0});
    for (int c = 0; c < image.c; ++c)
      for (int k = 1; k < 64; ++k) script.push_back({1, {c, 0, 0, 0}, k, k, 0, 0});
    info.scan_info = script.data();
    info.num_scans = static_cast<int>(script.size());
  }
  jpeg_start_compress(&info, TRUE);
  while (info.next_scanline < info.image_height) {
    auto* row = const_cast<JSAMPROW>(image.pixels.data()) +
                static_cast<size_t>(info.next_scanline) * image.w * image.c;
    jpeg_write_scanlines(&info, &row, 1);
  }
  jpeg_finish_compress(&info);
  jpeg_destroy_compress(&info);
  Bytes out(buffer, buffer + size);
  free(buffer);
  return out;
}

Image gradient(int h, int w, int c) {
  Image image = make_image(h, w, c);
  for (int y = 0; y < h; ++y)
    for (int x = 0; x < w; ++x)
      for (int k = 0; k < c; ++k)
        image.pixels[static_cast<size_t>((y * w + x) * c + k)] =
            static_cast<uint8_t>(20 + 3 * x + 2 * y + 30 * k);
  return image;
}

Thrown decoding(const Bytes& bytes) {
  return thrown_by([&] { decode_image(bytes, "the-file"); });
}

}  // namespace

TEST_CASE("encode_png: decodes to the same pixels", "[image_io]") {
  for (const int c : {1, 2, 3, 4})
    for (const auto& [h, w] : {std::pair{1, 1}, std::pair{5, 7}, std::pair{64, 33}}) {
      const Image image = pattern(h, w, c);
      const Bytes bytes = encode_png(image);
      CHECK(bytes == encode_png(image));
      const Image back = decode_image(bytes, "x");
      CHECK((back.h == h && back.w == w && back.c == c));
      CHECK(back.pixels == image.pixels);
    }
  CHECK(thrown_by([] { encode_png(make_image(2, 2, 5)); }).status == Status::kUsage);
}

TEST_CASE("decode_image: PNG depths, palettes, alpha, interlacing", "[image_io]") {
  SECTION("16 bits are scaled, not cut") {
    const Image image = decode_image(
        make_png({1, 3, 16, PNG_COLOR_TYPE_GRAY}, {0x00, 0xFF, 0x80, 0x80, 0xFF, 0xFF}), "x");
    CHECK(image.c == 1);
    CHECK(image.pixels == Bytes{1, 128, 255});  // 255 / 257 rounds to 1
  }
  SECTION("16-bit RGB and alpha") {
    const Image image = decode_image(
        make_png({1, 1, 16, PNG_COLOR_TYPE_RGBA}, {10, 10, 20, 20, 30, 30, 40, 40}), "x");
    CHECK(image.c == 4);
    CHECK(image.pixels == Bytes{10, 20, 30, 40});
  }
  SECTION("1-bit gray") {
    const Image image = decode_image(make_png({1, 8, 1, PNG_COLOR_TYPE_GRAY}, {0xA1}), "x");
    CHECK(image.pixels == Bytes{255, 0, 255, 0, 0, 0, 0, 255});
  }
  SECTION("palette") {
    PngKind kind{1, 4, 2, PNG_COLOR_TYPE_PALETTE};
    kind.palette = {{1, 2, 3}, {4, 5, 6}, {7, 8, 9}};
    const Image image = decode_image(make_png(kind, {0b00011001}), "x");
    CHECK(image.c == 3);
    CHECK(image.pixels == Bytes{1, 2, 3, 4, 5, 6, 7, 8, 9, 4, 5, 6});
    kind.alpha = {0, 100};
    const Image clear = decode_image(make_png(kind, {0b00011001}), "x");
    CHECK(clear.c == 4);
    CHECK(clear.pixels == Bytes{1, 2, 3, 0, 4, 5, 6, 100, 7, 8, 9, 255, 4, 5, 6, 100});
  }
  SECTION("gray and alpha") {
    const Image image = decode_image(make_png({1, 2, 8, PNG_COLOR_TYPE_GA}, {9, 8, 7, 6}), "x");
    CHECK(image.c == 2);
    CHECK(image.pixels == Bytes{9, 8, 7, 6});
  }
  SECTION("interlaced") {
    const Image image = pattern(13, 11, 3);
    const Bytes bytes = make_png({13, 11, 8, PNG_COLOR_TYPE_RGB, true}, image.pixels);
    CHECK(decode_image(bytes, "x").pixels == image.pixels);
  }
}

TEST_CASE("decode_image: a damaged PNG is refused, wherever the damage is", "[image_io]") {
  const Bytes good = encode_png(pattern(6, 5, 3));
  REQUIRE(decoding(good).status == Status::kOk);
  SECTION("truncated at every length") {
    for (size_t length = 0; length < good.size(); ++length) {
      const Thrown t = decoding(Bytes(good.begin(), good.begin() + static_cast<long>(length)));
      INFO(length << ": " << t.message);
      CHECK(t.status == Status::kFile);
      CHECK(t.says("the-file"));
    }
  }
  SECTION("every single bit flipped") {
    for (size_t bit = 0; bit < good.size() * 8; ++bit) {
      Bytes bad = good;
      bad[bit / 8] ^= static_cast<uint8_t>(1 << bit % 8);
      INFO("bit " << bit);
      CHECK(decoding(bad).status == Status::kFile);
    }
  }
}

TEST_CASE("decode_image: limits of PNG", "[image_io]") {
  const Bytes good = encode_png(pattern(6, 5, 3));
  CHECK(decoding(with_size(good, 5, 6)).status == Status::kOk);
  for (const auto& [w, h] : {std::pair{16385u, 1u}, std::pair{1u, 16385u},
                             std::pair{0x7FFFFFFFu, 0x7FFFFFFFu}, std::pair{0u, 6u}}) {
    const Thrown t = decoding(with_size(good, w, h));
    INFO(t.message);
    CHECK(t.status == Status::kFile);
    CHECK(t.says("IHDR"));
  }
  const Thrown pixels = decoding(with_size(good, 16384, 4097));
  CHECK(pixels.status == Status::kFile);
  CHECK(pixels.says("64 Mi pixels"));

  // Chunks that do not change the pixels are passed over, but not unchecked.
  CHECK(decoding(with_chunk(good, png_chunk("tEXt", Bytes(1 << 20, 'a')))).status == Status::kOk);
  const Thrown large = decoding(with_chunk(good, png_chunk("tEXt", Bytes(9 << 20, 'a'))));
  CHECK(large.status == Status::kFile);
  CHECK(large.says("too large"));
  CHECK(decoding(with_chunk(good, png_chunk("iCCP", Bytes(100, 'a')))).status == Status::kOk);
  Bytes bad_text = with_chunk(good, png_chunk("tEXt", {'k', 0, 'v'}));
  bad_text[33 + 8] ^= 1;
  CHECK(decoding(bad_text).status == Status::kFile);
}

TEST_CASE("decode_image: JPEG, gray and colour, baseline and progressive", "[image_io]") {
  for (const int c : {1, 3})
    for (const Scans scans : {Scans::kOne, Scans::kProgressive}) {
      const Image image = gradient(19, 26, c);
      const Image back = decode_image(make_jpeg(image, scans), "x");
      CHECK((back.h == 19 && back.w == 26 && back.c == c));
      int worst = 0;
      for (size_t i = 0; i < image.pixels.size(); ++i)
        worst = std::max(worst, std::abs(image.pixels[i] - back.pixels[i]));
      CHECK(worst <= 8);  // quality 95, chroma at half resolution
    }
}

TEST_CASE("decode_image: a damaged JPEG is refused or decoded, never worse", "[image_io]") {
  const Bytes good = make_jpeg(gradient(9, 10, 1));
  REQUIRE(decoding(good).status == Status::kOk);
  for (size_t length = 0; length < good.size(); ++length) {
    const Thrown t = decoding(Bytes(good.begin(), good.begin() + static_cast<long>(length)));
    INFO(length << ": " << t.message);
    CHECK(t.status == Status::kFile);
    CHECK(t.says("the-file"));
  }
  int refused = 0;
  for (size_t bit = 0; bit < good.size() * 8; ++bit) {  // JPEG has no checksum
    Bytes bad = good;
    bad[bit / 8] ^= static_cast<uint8_t>(1 << bit % 8);
    const Status status = decoding(bad).status;
    refused += status == Status::kFile;
    if (status != Status::kOk && status != Status::kFile) FAIL("bit " << bit);
  }
  CHECK(refused > 100);
}

TEST_CASE("decode_image: limits of JPEG", "[image_io]") {
  CHECK(decoding(make_jpeg(gradient(8, 8, 1), Scans::kPerCoefficient)).status == Status::kOk);
  const Thrown scans = decoding(make_jpeg(gradient(8, 8, 3), Scans::kPerCoefficient));  // 190
  CHECK(scans.status == Status::kFile);
  CHECK(scans.says("more than 100 scans"));
  const Thrown cmyk = decoding(make_jpeg(pattern(8, 8, 4), Scans::kOne, true));
  CHECK(cmyk.status == Status::kFile);
  CHECK(cmyk.says("convert it to RGB"));

  Bytes bytes = make_jpeg(gradient(8, 8, 1));
  const uint8_t frame[] = {0xFF, 0xC0};  // then length 2, precision 1, height 2, width 2
  const auto at = std::search(bytes.begin(), bytes.end(), frame, frame + 2);
  REQUIRE(at != bytes.end());
  at[5] = 0x40, at[6] = 0x01;  // 16385
  CHECK(decoding(bytes).says("more than 16384 pixels a side"));
  at[5] = 0x00, at[6] = 0x08, at[7] = 0x40, at[8] = 0x01;
  CHECK(decoding(bytes).says("more than 16384 pixels a side"));
  at[5] = 0x40, at[6] = 0x00, at[7] = 0x10, at[8] = 0x01;  // 16384 x 4097
  CHECK(decoding(bytes).says("64 Mi pixels"));
}

TEST_CASE("decode_image: other files", "[image_io]") {
  for (const Bytes& bytes : {Bytes{}, Bytes{'h', 'e', 'l', 'l', 'o'}, Bytes{0x89, 'P', 'N', 'G'},
                             Bytes{0xFF, 0xD8}, Bytes{'G', 'I', 'F', '8', '9', 'a', 0, 0, 0}}) {
    const Thrown t = decoding(bytes);
    CHECK(t.status == Status::kFile);
    CHECK(t.says("the-file: neither a PNG nor a JPEG"));
  }
}

TEST_CASE("write_png: whole files, or an error that names the place", "[image_io]") {
  TempFolder folder;
  const Image image = pattern(5, 4, 3);
  write_png(folder / "a.png", image);
  CHECK(read_image(folder / "a.png").pixels == image.pixels);
  const Thrown t = thrown_by([&] { write_png(folder / "none/a.png", image); });
  CHECK(t.status == Status::kFile);
  CHECK(t.says("none/a.png"));
}

TEST_CASE("write_png_folder: numbered files", "[image_io]") {
  TempFolder folder;
  const Image images = pattern(3 * 5, 4, 3);
  write_png_folder(folder / "x/y", images.pixels.data(), 3, 5, 4, 3, 98);
  for (int i = 0; i < 3; ++i) {
    const Image back = read_image(folder / format("x/y/%06d.png", 98 + i));
    CHECK((back.h == 5 && back.w == 4));
    CHECK(std::equal(back.pixels.begin(), back.pixels.end(), images.pixels.begin() + i * 60));
  }
  CHECK(std::distance(std::filesystem::directory_iterator(folder / "x/y"), {}) == 3);
}
