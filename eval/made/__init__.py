"""Models with random weights, in the shape of real ones: for speed, where values do not matter but sizes do.

shape.py      sizes of a model, and the known ones          linears.py  random matrices in EXL2, GPTQ and plain form
folder.py     a whole model folder
twin.py       the same sizes as a GGUF file, for peers
"""
