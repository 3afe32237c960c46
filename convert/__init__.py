"""`python -m convert`: EXL2 models out of fp16, bf16, fp32, GPTQ and EXL2 ones."""
