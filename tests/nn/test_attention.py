"""Attention: pooled, masked, and with a map from elsewhere."""

import math

import pytest
import torch

from fairseq_w2v2_light.nn import FrameMask
from fairseq_w2v2_light.nn.attention import MultiheadAttention
from fairseq_w2v2_light.nn.layer import EncoderLayer


def attention(dim=12, heads=3, **options):
    torch.manual_seed(0)
    return MultiheadAttention(dim, heads, **options).eval()


def naive_attention(module, query, key_value):
    """One utterance, head by head and query by query."""
    q, k, v = module.q_proj(query), module.k_proj(key_value), module.v_proj(key_value)
    width = module.head_dim
    rows = []
    for frame in range(len(query)):
        heads = []
        for head in range(module.heads):
            part = slice(head * width, (head + 1) * width)
            scores = torch.stack([q[frame, part] @ k[other, part] for other in range(len(k))]) / math.sqrt(width)
            weights = scores.exp() / scores.exp().sum()
            heads.append(sum(weight * v[other, part] for other, weight in enumerate(weights)))
        rows.append(torch.cat(heads))
    return module.out_proj(torch.stack(rows))


@pytest.mark.parametrize("return_map", (False, True))
def test_queries_and_keys_of_different_lengths(return_map):
    module = attention()
    query, key_value = torch.randn(2, 4, 12), torch.randn(2, 7, 12)
    with torch.no_grad():
        mixed, attention_map = module(query, key_value, return_map=return_map)
        for row in range(2):
            torch.testing.assert_close(mixed[row], naive_attention(module, query[row], key_value[row]))
    assert (attention_map is not None) == return_map


def test_masked_keys_change_nothing():
    module = attention()
    query, key_value = torch.randn(1, 4, 12), torch.randn(1, 7, 12)
    mask = FrameMask(torch.arange(7)[None] < 5)
    with torch.no_grad():
        expected, expected_map = module(query, key_value[:, :5], return_map=True)
        fast, _ = module(query, key_value, mask.attention())
        slow, attention_map = module(query, key_value, mask.attention(), return_map=True)
    torch.testing.assert_close(fast, expected)
    torch.testing.assert_close(slow, expected)
    torch.testing.assert_close(attention_map[..., :5], expected_map)
    assert attention_map[..., 5:].abs().max() == 0


def test_a_mask_per_query():
    module = attention()
    x = torch.randn(1, 6, 12)
    causal = torch.ones(6, 6).tril().bool()[None, None]
    changed = x.clone()
    changed[:, 4:] += 1
    with torch.no_grad():
        torch.testing.assert_close(module(x, x, causal)[0][:, :4], module(changed, changed, causal)[0][:, :4])


def test_rows_of_a_map_sum_to_one():
    module = attention()
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(module.attention_map(x, x).sum(-1), torch.ones(2, 3, 5))


def test_a_given_map_replaces_queries_and_keys():
    module = attention()
    x = torch.randn(2, 5, 12)
    attention_map = torch.softmax(torch.randn(2, 3, 5, 5), -1)
    with torch.no_grad():
        mixed, returned = module(x, x, attention_map=attention_map)
        values = module.v_proj(x).view(2, 5, 3, 4)
        expected = module.out_proj(torch.einsum("bhqk,bkhd->bqhd", attention_map, values).flatten(2))
    torch.testing.assert_close(mixed, expected)
    assert returned is attention_map


def test_both_ways_to_attend_have_equal_gradients():
    x = torch.randn(2, 5, 12)
    gradients = []
    for return_map in (False, True):
        module = attention()
        module(x, x, return_map=return_map)[0].square().sum().backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
    for fast, slow in zip(*gradients):
        torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4)


def test_dropout_is_on_the_map_in_training_only():
    module = attention(dropout=0.5)
    x = torch.randn(1, 50, 12)
    plain, _ = module(x, x, return_map=True)
    torch.testing.assert_close(module(x, x)[0], plain)
    module.train()
    for return_map in (False, True):
        mixed, attention_map = module(x, x, return_map=return_map)
        assert not torch.allclose(mixed, plain)
    torch.testing.assert_close(attention_map.sum(-1), torch.ones(1, 3, 50))


def test_heads_that_do_not_divide_the_width():
    with pytest.raises(ValueError, match="encoder_attention_heads: 5 heads do not divide encoder_embed_dim 12"):
        MultiheadAttention(12, 5)


@pytest.mark.parametrize("norm_first", (False, True))
@pytest.mark.parametrize("time", (1, 2, 5, 6))
@pytest.mark.parametrize("query_pool, kv_pool", ((2, 1), (1, 3), (2, 3), (3, 2)))
def test_pooled_layer_equals_a_plain_computation(norm_first, time, query_pool, kv_pool):
    torch.manual_seed(0)
    layer = EncoderLayer(12, 20, 3, norm_first=norm_first).eval()
    x = torch.randn(1, time, 12)

    def pooled(frames, factor):
        return torch.stack([frames[start : start + factor].mean(0) for start in range(0, len(frames), factor)])

    with torch.no_grad():
        hidden = (layer.self_attn_layer_norm(x) if norm_first else x)[0]
        mixed = naive_attention(layer.self_attn, pooled(hidden, query_pool), pooled(hidden, kv_pool))
        y = x[0] + torch.stack([mixed[frame // query_pool] for frame in range(time)])
        y = y if norm_first else layer.self_attn_layer_norm(y)
        ffn = layer.fc2(torch.nn.functional.gelu(layer.fc1(layer.final_layer_norm(y) if norm_first else y)))
        y = y + ffn if norm_first else layer.final_layer_norm(y + ffn)
        output = layer(x, query_pool=query_pool, kv_pool=kv_pool)
    torch.testing.assert_close(output.x[0], y, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.ffn[0], ffn, atol=1e-5, rtol=1e-5)
    assert output.attention_map is None


def test_a_map_in_half_precision_stays_near_the_one_in_fp32():
    module = attention(dim=64, heads=2)
    x = torch.randn(1, 9, 64) * 3
    with torch.no_grad():
        expected = module.attention_map(x, x)
        attention_map = module.bfloat16().attention_map(x.bfloat16(), x.bfloat16())
    assert attention_map.dtype == torch.bfloat16
    torch.testing.assert_close(attention_map.float(), expected, atol=0.05, rtol=0)


@pytest.mark.parametrize("frames", (1, 7, 500))
def test_a_map_is_the_same_with_and_without_gradients(frames):
    module = attention()
    x = torch.randn(2, frames, 12)
    mask = FrameMask.from_lengths(torch.tensor([frames, max(frames // 2, 1)]), frames)
    key_mask = None if mask is None else mask.attention()
    with_gradients = module.attention_map(x, x, key_mask)
    assert with_gradients.requires_grad
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(module.attention_map(x, x, key_mask), with_gradients.detach(), atol=1e-6, rtol=0)
