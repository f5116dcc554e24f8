"""What methods are called, and what each does, in words for a reader."""

from __future__ import annotations

ALGORITHMS = {
    "local": ("Local", "Every client trained alone on its own rows; nothing was exchanged."),
    "centralized": (
        "Centralized",
        "All rows were pooled and one model was trained on them: a reference point, not federated.",
    ),
    "ensemble": (
        "Ensemble",
        "Every client trained alone; at prediction time the probabilities of all models are averaged: a bound, since "
        "all models must be in one place.",
    ),
    "fedavg": (
        "FedAvg",
        "Clients with the same model sent their parameters; the server averaged them and sent them back.",
    ),
    "fedprox": (
        "FedProx",
        "Clients with the same model sent their parameters for averaging, and a penalty kept each client's training "
        "close to the average it started from.",
    ),
    "fedper": (
        "FedPer",
        "Clients with the same model averaged its backbone; each kept a head of its own.",
    ),
    "lg_fedavg": (
        "LG-FedAvg",
        "Each client kept a backbone of its own; only the heads were averaged.",
    ),
    "fedbn": (
        "FedBN",
        "Clients with the same model averaged it, but for its batch normalisation: each kept its own, fitted to how its "
        "data looks.",
    ),
    "fedrep": (
        "FedRep",
        "Clients with the same model averaged its backbone; each first trained a head of its own on it, then the backbone "
        "under that head.",
    ),
    "fedbabu": (
        "FedBABU",
        "Clients with the same model trained and averaged its backbone, under a head that nobody trains; before a model is "
        "read, its client fine-tunes a copy on its own rows.",
    ),
    "scaffold": (
        "SCAFFOLD",
        "As FedAvg, and each step of a client's training was corrected by how its mean gradient differs from the "
        "federation's, which both sides keep account of.",
    ),
    "fednova": (
        "FedNova",
        "As FedAvg, and each client's change was divided by the length of its path (its steps) before the mean was taken, so "
        "that who trains longer does not pull further.",
    ),
    "fedavgm": (
        "FedAvgM",
        "As FedAvg, and the server kept moving in the direction of earlier rounds (momentum).",
    ),
    "fedadam": (
        "FedAdam",
        "As FedAvg, and the server followed the mean update with the Adam optimizer in place of taking it as it is.",
    ),
    "fedyogi": (
        "FedYogi",
        "As FedAvg, and the server followed the mean update with the Yogi optimizer in place of taking it as it is.",
    ),
    "fedasync": (
        "FedAsync",
        "Clients with the same model trained at their own pace; whenever one sent its parameters, the server moved its model "
        "towards them, the less the older the model that they were made from.",
    ),
    "fedbuff": (
        "FedBuff",
        "Clients with the same model trained at their own pace and sent how they changed it; whenever enough had come, the "
        "server added their mean, in which older ones count for less.",
    ),
    "ditto": (
        "Ditto",
        "As FedAvg, and beside the shared model each client trained a personal one that is held close to it. On local tests "
        "the personal model is read, on the global test the shared one.",
    ),
    "heterofl": (
        "HeteroFL",
        "One wide model took the place of the clients' own: each trained as many of its channels as its width allows, and "
        "every weight was averaged over the clients that hold it.",
    ),
    "fedmd": (
        "FedMD",
        "Clients sent their predictions on the public proxy set; each then learned from the mean prediction and from "
        "its own rows. No parameters were exchanged.",
    ),
    "feddf": (
        "FedDF",
        "Clients sent their models; the server averaged those of one architecture, then taught each average with the "
        "predictions of all clients on the public proxy set.",
    ),
    "fd": (
        "FD",
        "Clients sent the mean output for each class; each then learned from its own rows and from the others' mean "
        "output for the class at hand.",
    ),
    "fedproto": (
        "FedProto",
        "Clients sent the mean features of each class; each pulled its own features towards the mean over all clients, "
        "and an example was given the class whose mean is nearest. No parameters were exchanged.",
    ),
    "fedtgp": (
        "FedTGP",
        "Clients sent the mean features of each class; from these the server trained one prototype for each class, so "
        "that classes stand apart. Each client pulled its own features towards them, and an example was given the class "
        "whose prototype is nearest. No parameters were exchanged.",
    ),
    "fedgh": (
        "FedGH",
        "Clients sent the mean features of each class; on these the server trained one head, which all clients took in "
        "place of their own. The rest of each model stayed with its client.",
    ),
    "fedgen": (
        "FedGen",
        "Clients with the same model sent their parameters for averaging. From all heads the server trained a generator "
        "of features for each class, and clients learned from what it draws beside their own rows.",
    ),
    "fml": (
        "FML",
        "Each client trained its own model together with a small one, each learning from the other's predictions; only "
        "the small ones were sent and averaged. On local tests a client's own model is read, on the global test the small one.",
    ),
    "fedkd": (
        "FedKD",
        "Each client trained its own model together with a small one, each learning from the other's predictions and "
        "features, the more the better both were; only changes of the small one were sent, compressed, and averaged. On "
        "local tests a client's own model is read, on the global test the small one.",
    ),
    "fedmrl": (
        "FedMRL",
        "Each client trained its own model together with a small one, on features of both that a map of its own puts "
        "together; only the small ones were sent and averaged. What is read is the client's own head on both features.",
    ),
    "ds_fl": (
        "DS-FL",
        "Clients sent their class probabilities on public rows; each then learned from the mean of all, made more "
        "decided, and from its own rows. No parameters were exchanged.",
    ),
    "kt_pfl": (
        "KT-pFL",
        "Clients sent their predictions on the public proxy set; the server learned for each client whom to listen to, "
        "and each then learned from its own mixture of the others. No parameters were exchanged.",
    ),
    "fedgkt": (
        "FedGKT",
        "Clients sent the features, outputs and label of each of their rows; the server trained a large model on them, "
        "and each side learned from the other's outputs. Examples are read by the client's features and the large model.",
    ),
    "dense": (
        "DENSE",
        "Clients trained alone and sent their models once, at the end; the server made examples from the models, taught "
        "a student with their mean prediction on those, and gave the student to all.",
    ),
    "hybrid": (
        "Hybrid",
        "Clients sent what they have in common: the parameters of shared layers were averaged, and predictions on the "
        "public proxy set became a teacher from which every model learned, whatever its architecture.",
    ),
}
