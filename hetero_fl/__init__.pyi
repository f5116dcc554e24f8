"""Public names of hetero_fl, each imported from its module on first use."""

from hetero_fl.algorithms import (
    DSFL as DSFL,
    FD as FD,
    FML as FML,
    Algorithm as Algorithm,
    Centralized as Centralized,
    Dense as Dense,
    Ditto as Ditto,
    Ensemble as Ensemble,
    FedAdam as FedAdam,
    FedAsync as FedAsync,
    FedAvg as FedAvg,
    FedAvgFT as FedAvgFT,
    FedAvgM as FedAvgM,
    FedBABU as FedBABU,
    FedBN as FedBN,
    FedBuff as FedBuff,
    FedDF as FedDF,
    FedGen as FedGen,
    FedGH as FedGH,
    FedGKT as FedGKT,
    FedKD as FedKD,
    FedLC as FedLC,
    FedMD as FedMD,
    FedMRL as FedMRL,
    FedNova as FedNova,
    FedPer as FedPer,
    FedProto as FedProto,
    FedProx as FedProx,
    FedRep as FedRep,
    FedTGP as FedTGP,
    FedYogi as FedYogi,
    HeteroFL as HeteroFL,
    Hybrid as Hybrid,
    KTpFL as KTpFL,
    LGFedAvg as LGFedAvg,
    Local as Local,
    Needs as Needs,
    Scaffold as Scaffold,
    local_fit as local_fit,
    register_algorithm as register_algorithm,
)
from hetero_fl.config.base import (
    SGD as SGD,
    Adam as Adam,
    AdamW as AdamW,
)
from hetero_fl.config.clients import (
    AugmentConfig,
    ClientSettings as ClientSettings,
    PreprocessConfig,
    ScannerConfig,
)
from hetero_fl.config.communication import (
    ChannelConfig,
)
from hetero_fl.config.partitions import (
    IID as IID,
    Classes as Classes,
    Dirichlet as Dirichlet,
    Natural as Natural,
    Partition as Partition,
    Quantity as Quantity,
)
from hetero_fl.config.protection import (
    AggregationConfig,
    AttacksConfig,
    PrivacyConfig,
)
from hetero_fl.config.schema import (
    EvaluationConfig,
    OutputConfig,
    RuntimeConfig,
    ServerConfig,
)
from hetero_fl.config.simulation import (
    CohortConfig,
    DeviceConfig,
    DevicesConfig,
    FaultsConfig,
)
from hetero_fl.core.objectives import (
    Objective as Objective,
)
from hetero_fl.core.payload import (
    Item as Item,
    ItemSpec as ItemSpec,
)
from hetero_fl.core.plan import (
    ClassSums as ClassSums,
    Fit as Fit,
    Predict as Predict,
    Rows as Rows,
)
from hetero_fl.core.task import (
    Task as Task,
)
from hetero_fl.data import (
    from_arrays as from_arrays,
    register_partition as register_partition,
    register_source as register_source,
)
from hetero_fl.experiment import (
    audit as audit,
    compare as compare,
    evaluate as evaluate,
    export as export,
    join as join,
    prepare as prepare,
    run as run,
)
from hetero_fl.experiment.client import (
    Client as Client,
    split as split,
)
from hetero_fl.experiment.configuration import (
    load_config as load_config,
)
from hetero_fl.experiment.federation import (
    Federation as Federation,
)
from hetero_fl.experiment.trainer import (
    Trainer as Trainer,
)
from hetero_fl.reporting.comparison.result import (
    Comparison as Comparison,
)
from hetero_fl.reporting.loggers import (
    Logger as Logger,
    register_logger as register_logger,
)
from hetero_fl.reporting.run import (
    Run as Run,
)
from hetero_fl.utils.errors import (
    UserError as UserError,
)
from hetero_fl.utils.version import __version__ as __version__
from model_zoo import (
    SplitModel as SplitModel,
    register_model as register_model,
)

Augment = AugmentConfig
Preprocess = PreprocessConfig
Scanner = ScannerConfig
Channel = ChannelConfig
Privacy = PrivacyConfig
Aggregation = AggregationConfig
Attacks = AttacksConfig
Evaluation = EvaluationConfig
Output = OutputConfig
Runtime = RuntimeConfig
Server = ServerConfig
Cohort = CohortConfig
Device = DeviceConfig
Devices = DevicesConfig
Faults = FaultsConfig
