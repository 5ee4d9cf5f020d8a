"""PETR, Q-PETR's position embedding, and the operators with which FQ-PETR quantizes both."""
