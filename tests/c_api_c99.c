/* The header is C99, and a C program can use the library. */
#include "model/ddpm.h"

#include <stdlib.h>

/* One image of zeros at timestep 5 through the network of `folder`; its first value in *value. */
int c99_forward(const char* folder, float* value) {
  ddpm_model* model = NULL;
  ddpm_session* session = NULL;
  ddpm_info info;
  const int32_t timestep = 5;
  ddpm_model_options options = {0};
  int status;
  options.struct_size = sizeof options;
  options.device = "cpu";
  options.threads = 1;
  status = ddpm_model_load(folder, &options, &model);
  info.struct_size = sizeof info;
  if (status == DDPM_OK) status = ddpm_get_info(model, &info);
  if (status == DDPM_OK) status = ddpm_forward_open(model, 1, &session);
  if (status == DDPM_OK) {
    const size_t pixels = (size_t)info.height * (size_t)info.width;
    float* sample = calloc(pixels * (size_t)info.channels, sizeof(float));
    float* output = calloc(pixels * (size_t)info.output_channels, sizeof(float));
    status = ddpm_forward(session, sample, &timestep, NULL, output, NULL);
    *value = output[0];
    free(sample);
    free(output);
  }
  ddpm_session_destroy(session);
  ddpm_model_destroy(model);
  return status;
}
