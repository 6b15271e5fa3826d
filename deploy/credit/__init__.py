"""The measure of credit: values of prefixes by branches, and how far rules agree with them."""
