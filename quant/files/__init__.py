"""Bytes on a disk: atomic writes, bounded reads, safetensors files, memory in huge pages."""
