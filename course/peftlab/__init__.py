"""The lab bench: what the units use and the student does not have to write.

Modules are imported one at a time (`from peftlab import llama`), so that importing the package costs no more than
importing torch.
"""
