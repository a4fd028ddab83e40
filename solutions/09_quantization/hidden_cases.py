"""The hidden cases of unit 09_quantization: for every check, what kind of case it is and how to make one."""

import torch

from autograder.checks import quantization

CASES = {
    quantization.check_absmax_int8: {
        "in float16": lambda generator: quantization.int8_case(generator, torch.float16),
        "in double precision": lambda generator: quantization.int8_case(generator, torch.float64),
    },
    quantization.check_levels: {
        "for 6 bits": lambda generator: quantization.levels_case(generator, 6),
        "for 2 bits": lambda generator: quantization.levels_case(generator, 2),
    },
    quantization.check_nearest_level: {
        "in double precision": lambda generator: quantization.nearest_case(generator, 16, (3, 17, 5), torch.float64),
        "among 256 levels": lambda generator: quantization.nearest_case(generator, 256, (7, 101)),
        "among three levels": lambda generator: quantization.nearest_case(generator, 3, (4, 9)),
    },
    quantization.check_pack: {
        "with a thousand codes and more": lambda generator: quantization.pack_case(generator, 500, 600),
        "with few codes": lambda generator: quantization.pack_case(generator, 2, 5),
    },
    quantization.check_quantize: {
        "in float16": lambda generator: quantization.quantize_case(generator, torch.float16, 64),
        "in bfloat16, in blocks of 128": lambda generator: quantization.quantize_case(generator, torch.bfloat16, 128),
        "on a weight that is not contiguous": lambda generator: quantization.quantize_case(
            generator, block_size=64, transposed=True
        ),
    },
    quantization.check_dequantize: {
        "in float16": lambda generator: quantization.dequantize_case(generator, "float16", 64),
        "in blocks of 128": lambda generator: quantization.dequantize_case(generator, "bfloat16", 128),
    },
    quantization.check_double_quantize: {
        "with fewer than 256 values": lambda generator: quantization.double_case(generator, 100, 200),
        "with four blocks": lambda generator: quantization.double_case(generator, 800, 1000),
    },
    quantization.check_bits: {
        "with small blocks": lambda generator: quantization.bits_case(generator, 1, 3),
        "with large blocks": lambda generator: quantization.bits_case(generator, 9, 12),
    },
    quantization.check_to_blocks: {
        "in blocks of 64": lambda generator: quantization.blocks_case(generator, 64),
        "in bfloat16": lambda generator: quantization.blocks_case(generator, dtype=torch.bfloat16),
    },
}

# Automatic mutants that no check rejects (`python -m autograder.proving.prove`), and why they may live.
SURVIVORS = {}
