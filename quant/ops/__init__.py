"""Operations on packed tensors: products, whole experts, and quantizing itself. They choose the kernel."""
