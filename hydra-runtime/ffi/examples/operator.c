// The operator on two threads of its caller, as ggml calls a custom operator: forward and backward, compared with loops
// that say what they compute.
#include "hydra.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

enum { TOKENS = 21, D_IN = 96, D_OUT = 130, RANK = 3, HEADS = 4, MIXED = RANK * HEADS, STATE = RANK + HEADS };
#define SCALE 2.0f

static float w[D_OUT * D_IN], a[STATE * D_IN], b[D_OUT * MIXED], x[TOKENS * D_IN], dy[TOKENS * D_OUT];
static float y[TOKENS * D_OUT], state[TOKENS * STATE], dx[TOKENS * D_IN], da[STATE * D_IN], db[D_OUT * MIXED];

// ---- One thread's work -------------------------------------------------------------------------------------------

struct worker {
    const hydra_layer *layer;
    const hydra_forward_args *forward;
    const hydra_backward_args *backward;
    hydra_thread thread;
    hydra_status status;
    char error[256];
};

static void *work(void *argument) {
    struct worker *worker = argument;
    if (worker->backward == NULL) {
        worker->status = hydra_forward(worker->layer, worker->forward, &worker->thread);
    } else {
        worker->status = hydra_backward(worker->layer, worker->backward, &worker->thread);
    }
    // The error's text belongs to this thread.
    snprintf(worker->error, sizeof worker->error, "%s", hydra_last_error());
    return NULL;
}

// One pass on two threads; returns 0 if both are done.
static int run(const hydra_layer *layer, const hydra_forward_args *forward, const hydra_backward_args *backward) {
    enum { THREADS = 2 };
    struct worker workers[THREADS];
    pthread_t threads[THREADS];
    size_t floats;
    hydra_status status = backward == NULL ? hydra_forward_scratch(layer, forward, THREADS, &floats)
                                           : hydra_backward_scratch(layer, backward, THREADS, &floats);
    if (status != HYDRA_STATUS_OK) {
        fprintf(stderr, "error: %s\n", hydra_last_error());
        return 1;
    }
    int failed = 0;
    for (size_t i = 0; i < THREADS; i++) {
        float *scratch = aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64);
        workers[i] = (struct worker){layer, forward, backward, {i, THREADS, scratch, floats}, HYDRA_STATUS_OK, ""};
        pthread_create(&threads[i], NULL, work, &workers[i]);
    }
    for (size_t i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
        free(workers[i].thread.scratch);
        if (workers[i].status != HYDRA_STATUS_OK) {
            fprintf(stderr, "error: %s\n", workers[i].error);
            failed = 1;
        }
    }
    return failed;
}

// ---- What it computes --------------------------------------------------------------------------------------------

static double want_y[TOKENS * D_OUT], want_dx[TOKENS * D_IN], want_da[STATE * D_IN], want_db[D_OUT * MIXED];

static void reference(void) {
    for (int t = 0; t < TOKENS; t++) {
        const float *xt = x + t * D_IN, *dyt = dy + t * D_OUT;
        double down[RANK] = {0}, gate[HEADS] = {0}, d_down[RANK] = {0}, d_gate[HEADS] = {0};
        for (int i = 0; i < D_IN; i++) {
            for (int j = 0; j < RANK; j++) {
                down[j] += (double)a[j * D_IN + i] * xt[i];
            }
            for (int e = 0; e < HEADS; e++) {
                gate[e] += (double)a[(RANK + e) * D_IN + i] * xt[i];
            }
        }
        double sum = 0.0, dot = 0.0;
        for (int e = 0; e < HEADS; e++) {
            sum += gate[e] = exp(gate[e]);
        }
        for (int e = 0; e < HEADS; e++) {
            gate[e] /= sum;
        }
        for (int o = 0; o < D_OUT; o++) {
            for (int i = 0; i < D_IN; i++) {
                want_y[t * D_OUT + o] += (double)w[o * D_IN + i] * xt[i];
                want_dx[t * D_IN + i] += (double)w[o * D_IN + i] * dyt[o];
            }
            for (int e = 0; e < HEADS; e++) {
                for (int j = 0; j < RANK; j++) {
                    double weight = b[o * MIXED + e * RANK + j], slope = SCALE * (double)dyt[o];
                    want_y[t * D_OUT + o] += SCALE * weight * gate[e] * down[j];
                    want_db[o * MIXED + e * RANK + j] += slope * gate[e] * down[j];
                    d_down[j] += slope * weight * gate[e];
                    d_gate[e] += slope * weight * down[j];
                }
            }
        }
        for (int e = 0; e < HEADS; e++) {
            dot += gate[e] * d_gate[e];
        }
        for (int row = 0; row < STATE; row++) {
            double slope = row < RANK ? d_down[row] : gate[row - RANK] * (d_gate[row - RANK] - dot);
            for (int i = 0; i < D_IN; i++) {
                want_dx[t * D_IN + i] += slope * a[row * D_IN + i];
                want_da[row * D_IN + i] += slope * xt[i];
            }
        }
    }
}

// ---- The comparison ----------------------------------------------------------------------------------------------

static void fill(float *values, size_t len, float bound) {
    static uint32_t random = 1;
    for (size_t i = 0; i < len; i++) {
        random = random * 1664525u + 1013904223u;
        values[i] = bound * ((float)(random >> 8) / 8388608.0f - 1.0f);
    }
}

// The largest difference, relative to the largest value; returns whether it is small.
static int close_to(const char *name, const float *got, const double *want, size_t len) {
    double largest = 0.0, difference = 0.0;
    for (size_t i = 0; i < len; i++) {
        largest = fmax(largest, fabs(want[i]));
        difference = got[i] == got[i] ? fmax(difference, fabs(got[i] - want[i])) : INFINITY;
    }
    printf("%-2s differs by %.1e of its largest value\n", name, difference / largest);
    return difference <= 1e-5 * largest;
}

int main(void) {
    fill(w, D_OUT * D_IN, 0.1f);
    fill(a, STATE * D_IN, 0.2f);
    fill(b, D_OUT * MIXED, 0.5f);
    fill(x, TOKENS * D_IN, 1.0f);
    fill(dy, TOKENS * D_OUT, 1.0f);
    hydra_layer layer = {
        .d_in = D_IN, .d_out = D_OUT, .weight = w, .weight_bytes = sizeof w, .weight_type = HYDRA_TYPE_F32,
        .product_type = HYDRA_TYPE_F32, .rank = RANK, .lora_heads = HEADS, .gate = HYDRA_GATE_ROUTER,
        .temperature = 1.0f, .scale = SCALE, .a = a, .a_len = STATE * D_IN, .b = b, .b_len = D_OUT * MIXED,
    };
    hydra_forward_args forward = {
        .tokens = TOKENS, .element = HYDRA_TYPE_F32, .x = x, .y = y, .adapter_state = state,
    };
    hydra_backward_args backward = {
        .tokens = TOKENS, .element = HYDRA_TYPE_F32, .dy = dy, .x = x, .adapter_state = state,
        .dx = dx, .da = da, .db = db,
    };
    if (run(&layer, &forward, NULL) != 0 || run(&layer, NULL, &backward) != 0) {
        return 1;
    }
    reference();
    int close = close_to("y", y, want_y, TOKENS * D_OUT);
    close &= close_to("dx", dx, want_dx, TOKENS * D_IN);
    close &= close_to("da", da, want_da, STATE * D_IN);
    close &= close_to("db", db, want_db, D_OUT * MIXED);
    return close ? 0 : 1;
}
