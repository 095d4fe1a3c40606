"""What a checkpoint is, counted by hand."""

import numpy as np

from alaya_jax.checkpoint import open_checkpoint
from alaya_jax.checkpoint.inspection import inspect_source


def test_parameters_bytes_and_where_each_tensor_is(make_config, make_tensors, write_hf):
    config = make_config(tie_word_embeddings=True)
    tensors = make_tensors(config, np.float16)
    found = inspect_source(open_checkpoint(write_hf(config, tensors)))
    count = sum(x.size for x in tensors.values())
    assert found["format"] == "hf"
    assert found["parameters"] == count
    assert found["parameters_by_stored_type"] == {"F16": count}
    assert found["bytes"]["stored"] == 2 * count
    assert found["bytes"]["weights"] == {
        "float32": 4 * count,
        "bfloat16": 2 * count,
        "float16": 2 * count,
    }
    # 2 layers, keys and values, 2 kv heads of 16.
    assert found["bytes"]["kv_per_token"]["float32"] == 2 * 2 * 2 * 16 * 4
    assert found["tokenizer"] is None
    assert len(found["tensors"]) == len(tensors)
    q = found["tensors"]["layers_0/attention/q/kernel"]
    assert q["stored_as"] == "model.layers.0.self_attn.q_proj.weight"
    assert (q["stored_shape"], q["shape"]) == ([64, 32], [32, 4, 16])
    assert q["axes"] == ["embed", "heads", "head_dim"]
