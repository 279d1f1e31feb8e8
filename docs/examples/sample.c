/* Samples four images and writes them side by side: sample MODEL OUT.png [STEPS]
 *
 *   cc sample.c -o sample $(pkg-config --cflags --libs ddpm)
 */
#include <ddpm.h>
#include <stdio.h>
#include <stdlib.h>

#include "png.h"

enum { COUNT = 4 };

static int write_file(const char* path, const uint8_t* data, size_t size) {
  FILE* file = fopen(path, "wb");
  int good;
  if (file == NULL) return 0;
  good = fwrite(data, 1, size, file) == size;
  return fclose(file) == 0 && good;
}

int main(int argc, char** argv) {
  ddpm_model* model = NULL;
  ddpm_sampler* sampler = NULL;
  ddpm_sampler_options options = {0};
  ddpm_info info = {0};
  uint8_t *images = NULL, *png = NULL;
  size_t size = 0;
  ddpm_status status;
  if (argc < 3) {
    fprintf(stderr, "usage: sample MODEL OUT.png [STEPS]\n");
    return DDPM_USAGE;
  }
  info.struct_size = sizeof info;
  options.struct_size = sizeof options;
  options.batch_size = COUNT;
  options.sampler = "ddim";
  options.steps = argc > 3 ? atoi(argv[3]) : 0;
  status = ddpm_model_load(argv[1], NULL, &model);
  if (status == DDPM_OK) status = ddpm_get_info(model, &info);
  if (status == DDPM_OK) status = ddpm_sampler_create(model, &options, &sampler);
  if (status == DDPM_OK) {
    images =
        malloc((size_t)COUNT * (size_t)info.height * (size_t)info.width * (size_t)info.channels);
    status = images == NULL ? DDPM_MEMORY : ddpm_sample(sampler, 0, 0, COUNT, images);
  }
  if (status != DDPM_OK) {
    fprintf(stderr, "%s: %s\n", ddpm_status_string(status), ddpm_last_error());
  } else {
    png = png_of(images, COUNT, &info, &size);
    if (png == NULL || !write_file(argv[2], png, size)) {
      fprintf(stderr, "%s could not be written\n", argv[2]);
      status = DDPM_FILE;
    }
  }
  free(png);
  free(images);
  ddpm_sampler_destroy(sampler);
  ddpm_model_destroy(model);
  return status;
}
