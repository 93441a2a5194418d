// Generates text with an adapter: generate MODEL ADAPTER PROMPT
#include "hydra.h"

#include <stdio.h>
#include <string.h>

static int32_t print(const char *text, size_t len, void *user) {
    (void)user;
    fwrite(text, 1, len, stdout);
    return 0; // go on
}

int main(int argc, char **argv) {
    if (argc != 4) {
        fprintf(stderr, "usage: generate MODEL ADAPTER PROMPT\n");
        return 2;
    }
    hydra_model model = 0;
    hydra_adapter adapter = 0;
    hydra_status status = hydra_model_open(argv[1], NULL, &model);
    if (status == HYDRA_STATUS_OK) {
        status = hydra_adapter_load(model, argv[2], &adapter);
    }
    if (status == HYDRA_STATUS_OK) {
        hydra_generate_options options = hydra_generate_options_default();
        options.adapter = adapter;
        options.temperature = 0.7f;
        options.max_tokens = 32;
        status = hydra_generate(model, argv[3], strlen(argv[3]), &options, print, NULL, NULL);
        printf("\n");
    }
    if (status != HYDRA_STATUS_OK) {
        fprintf(stderr, "error: %s\n", hydra_last_error());
    }
    hydra_adapter_free(adapter);
    hydra_model_free(model);
    return status == HYDRA_STATUS_OK ? 0 : 1;
}
