"""The tables that stages write and read: their schemas, and code that several stages share to read and write them."""
