"""The file of a SentencePiece model as a protocol buffer: its pieces, and what kind of model they make.

SentencePiece's own description is made with a protobuf so new that it refuses the one that Beam needs.
"""

import functools
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

# Of sentencepiece_model.proto: the kinds of pieces that matter here, and the one of models.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
BPE = 2


@functools.cache
def model_proto() -> Any:
    """The class of a model's file, with the fields that are read here; it keeps the others as they are."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="gpt1_jax/sentencepiece_model.proto", package="gpt1_jax")
    piece = file.message_type.add(name="Piece")
    piece.field.add(name="piece", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    piece.field.add(name="score", number=2, type=field.TYPE_FLOAT, label=field.LABEL_OPTIONAL)
    piece.field.add(name="type", number=3, type=field.TYPE_INT32, label=field.LABEL_OPTIONAL, default_value=str(NORMAL))
    trainer = file.message_type.add(name="TrainerSpec")
    trainer.field.add(name="model_type", number=3, type=field.TYPE_INT32, label=field.LABEL_OPTIONAL, default_value="1")
    model = file.message_type.add(name="Model")
    for name, number, label, kind in (
        ("pieces", 1, field.LABEL_REPEATED, "Piece"),
        ("trainer_spec", 2, field.LABEL_OPTIONAL, "TrainerSpec"),
    ):
        model.field.add(name=name, number=number, type=field.TYPE_MESSAGE, label=label, type_name=f".gpt1_jax.{kind}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("gpt1_jax.Model"))
