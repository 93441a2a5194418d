"""A soak of `hydra serve`: soak.py PORT PID REQUESTS. `.ci/soak` starts the server, with "tiny" and its adapter "run".

Sixteen clients send greedy requests of mixed lengths, one in ten of which goes away before its answer. Each answer has to
be that of the same request alone; at the end nothing runs, and the resident memory is what it was after a tenth."""

import http.client
import json
import random
import sys
import threading
import time

PORT, PID, REQUESTS = (int(argument) for argument in sys.argv[1:])
WORDS = "the hydra has nine heads and each of them tells another story about numbers facts topics words".split()
# Growth that is not a leak: the allocator's and the log's.
MOST_GROWTH_KIB = 8 << 10


def post(body, cut=False):
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=120)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    if cut:
        time.sleep(random.random() * 0.05)
        connection.close()
        return None
    response = connection.getresponse()
    answer = json.loads(response.read())
    assert response.status == 200, answer
    return answer["choices"]


def metric(name):
    connection = http.client.HTTPConnection("127.0.0.1", PORT)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    return float(next(line for line in lines if line.startswith(name + " ")).split()[1])


def resident_kib():
    with open(f"/proc/{PID}/status") as status:
        return int(next(line for line in status if line.startswith("VmRSS:")).split()[1])


def case(random):
    prompt = " ".join(random.choice(WORDS) for _ in range(random.randint(1, 120)))
    model = random.choice(["tiny", "run"])
    return {"model": model, "prompt": prompt, "max_tokens": random.randint(1, 24), "temperature": 0}


cases = [case(random.Random(seed)) for seed in range(40)]
alone = [post(body) for body in cases]
done, wrong, memory = [], [], []


def client(seed):
    draw = random.Random(seed)
    while len(done) < REQUESTS:
        which, cut = draw.randrange(len(cases)), draw.random() < 0.1
        try:
            answer = post({**cases[which], "stream": cut and draw.random() < 0.5}, cut)
            if answer not in (None, alone[which]):
                wrong.append((cases[which], answer, alone[which]))
        except Exception as error:
            wrong.append((cases[which], error))
        done.append(which)
        if len(done) == REQUESTS // 10:
            memory.append(resident_kib())


clients = [threading.Thread(target=client, args=(seed,)) for seed in range(16)]
[thread.start() for thread in clients]
[thread.join() for thread in clients]
assert not wrong, f"{len(wrong)} of {len(done)} answers are wrong; the first: {wrong[0]}"
for _ in range(100):
    if metric("hydra_requests_running") == metric("hydra_requests_queued") == 0:
        break
    time.sleep(0.1)
else:
    raise AssertionError("a request is stuck")
growth = resident_kib() - memory[0]
assert growth < MOST_GROWTH_KIB, f"the server has grown by {growth} KiB"
cut = int(metric("hydra_disconnected_total"))
print(f"{len(done)} requests, {cut} of them cut off: no wrong answer, nothing stuck, resident memory {growth:+} KiB")
