// Teaches a model one answer, saves the adapter, and scores the answer with it: train MODEL ADAPTER_OUT
#include "hydra.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define STEPS 20

static void check(hydra_status status) {
    if (status != HYDRA_STATUS_OK) {
        fprintf(stderr, "error: %s\n", hydra_last_error());
        exit(1);
    }
}

// Appends a text's tokens; returns how many there are then.
static size_t append(hydra_model model, const char *text, int begins, uint32_t *tokens, size_t count, size_t room) {
    size_t added;
    check(hydra_tokenize(model, text, strlen(text), begins, tokens + count, room - count, &added));
    return count + added;
}

int main(int argc, char **argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: train MODEL ADAPTER_OUT\n");
        return 2;
    }
    hydra_model model;
    check(hydra_model_open(argv[1], NULL, &model));

    // One example: the loss is taken on the answer.
    uint32_t tokens[128];
    hydra_sequence example = {.tokens = tokens, .lora_head = HYDRA_NO_LORA_HEAD};
    example.prompt_len = append(model, "What has nine heads?\n", 1, tokens, 0, 128);
    example.len = append(model, "A hydra.", 0, tokens, example.prompt_len, 128);

    hydra_adapter fresh;
    check(hydra_adapter_init(model, NULL, 0, &fresh));
    hydra_train_options options = hydra_train_options_default();
    options.max_tokens = 128;
    hydra_trainer trainer;
    check(hydra_trainer_new(model, fresh, &options, &trainer));
    hydra_step_report first, report;
    for (int step = 0; step < STEPS; step++) {
        check(hydra_trainer_step(trainer, &example, 1, 5e-3f, step == 0 ? &first : &report));
    }
    printf("loss %.4f at the first step, %.4f at step %d\n", first.loss, report.loss, STEPS);

    hydra_adapter trained, loaded;
    check(hydra_trainer_adapter(trainer, &trained));
    check(hydra_adapter_save(trained, argv[2]));
    check(hydra_adapter_load(model, argv[2], &loaded));
    hydra_loss loss;
    check(hydra_evaluate(model, loaded, &example, 1, 128, &loss));
    printf("loss %.4f with the adapter from %s\n", loss.nll / (double)loss.targets, argv[2]);

    check(hydra_trainer_free(trainer));
    check(hydra_adapter_free(fresh));
    check(hydra_adapter_free(trained));
    check(hydra_adapter_free(loaded));
    check(hydra_model_free(model));
    return report.loss < first.loss ? 0 : 1;
}
