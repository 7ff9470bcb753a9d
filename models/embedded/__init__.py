"""The default base model: a small LLaVA that answers questions about `scenes`; training/embedded/ trained it."""
