"""The shipped model inside a program: no socket, no thread, no configuration. The trades are made up, 50 ms apart."""

import numpy as np
import torch

import streamattn
from streamattn.tape import trade_events

torch.set_num_threads(1)  # a small model: more threads only wait for each other
checkpoint = streamattn.load_checkpoint(streamattn.shipped_model("emini"))
stream = streamattn.Engine(checkpoint.model, lanes=8).open("ES")
price = 1640 + 0.25 * np.random.default_rng(0).integers(-1, 2, 500).cumsum()
_, ids, features = trade_events(np.arange(500) * 50_000_000, price, np.ones(500))
for i in range(len(ids)):
    result = stream.push(ids[i], features[i])  # one event in, one answer out: what the next price move will be
    print(result.sequence, torch.tensor(result.heads["next"][0]).softmax(0))  # odds of down, flat, up
