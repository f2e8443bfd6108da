"""Pure functions of tensors: no modules, no state, no devices moved."""
