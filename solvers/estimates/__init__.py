"""The solver's own error and stiffness estimates."""
