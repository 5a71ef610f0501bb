// Prints what the binary interface of V3 plugins is: enum values, sizes and offsets, RTTI names, what interfaces call
// themselves, and the vtable slot and signature of every method. Compiled against our headers and against TensorRT's;
// the lines must be the same.
//
// The logger exists in two forms (see abi/logging.h). Our build prints both, marked "optional": TensorRT's headers of
// any one version have one of them.
#ifdef SHUNTYARD_PROBE_TENSORRT
#include <NvInferRuntime.h>
#else
#include "abi/logging.h"
#include "abi/plugin.h"
#include "abi/shapes.h"
#endif

#include <cstddef>
#include <cstdio>
#include <cstring>
#include <typeinfo>

using namespace nvinfer1;

namespace {

const char* prefix = "";

// A pointer to a virtual method, as the Itanium C++ ABI has it: one more than the byte offset in the vtable.
template <typename Method>
long slot_of(Method method) {
    static_assert(sizeof(method) == 2 * sizeof(ptrdiff_t), "a pointer to a method is a pair of words");
    ptrdiff_t words[2];
    std::memcpy(words, &method, sizeof(words));
    return words[0] % 2 == 1 ? (words[0] - 1) / static_cast<long>(sizeof(void*)) : -1;
}

// A pointer to a data member is the member's offset.
template <typename Member>
long offset_of(Member member) {
    ptrdiff_t offset;
    static_assert(sizeof(member) == sizeof(offset), "a pointer to a data member is a word");
    std::memcpy(&offset, &member, sizeof(offset));
    return offset;
}

#define TYPE(type) std::printf("%stype %s: %zu bytes, RTTI %s\n", prefix, #type, sizeof(type), typeid(type).name())
#define VALUE(enumerator) std::printf("%svalue %s: %ld\n", prefix, #enumerator, static_cast<long>(enumerator))
#define FIELD(type, member)                                                                                \
    std::printf("%sfield %s::%s: offset %zu, %zu bytes\n", prefix, #type, #member, offsetof(type, member), \
                sizeof(type::member))
#define SLOT(type, method)                                                                            \
    std::printf("%sslot %s::%s: %ld, signature %s\n", prefix, #type, #method, slot_of(&type::method), \
                typeid(&type::method).name())

// One method more than an interface has: its slot is the interface's number of slots. A method that TensorRT appends is
// in none of the lines above, and would be called where our vtable has ended.
template <typename Interface>
struct Extended : Interface {
    virtual void next() = 0;
};
#define END(type) std::printf("%send %s: slot %ld\n", prefix, #type, slot_of(&Extended<type>::next))

// The kind and version by which TensorRT knows an interface. The classes are abstract and this method looks at no
// member, so it is called, not virtually, on memory that holds no object.
#define INFO(type)                                                                                  \
    do {                                                                                            \
        alignas(type) static char memory[sizeof(type)];                                             \
        const InterfaceInfo info = reinterpret_cast<const type*>(memory)->type::getInterfaceInfo(); \
        std::printf("%sinfo %s: %s %d.%d\n", prefix, #type, info.kind, info.major, info.minor);     \
    } while (false)

void data_types() {
    VALUE(DataType::kFLOAT);
    VALUE(DataType::kHALF);
    VALUE(DataType::kINT8);
    VALUE(DataType::kINT32);
    VALUE(DataType::kBOOL);
    VALUE(DataType::kUINT8);
    VALUE(DataType::kFP8);
    VALUE(DataType::kBF16);
    VALUE(DataType::kINT64);
    VALUE(DataType::kINT4);
    VALUE(TensorFormat::kLINEAR);
    VALUE(PluginFieldType::kFLOAT16);
    VALUE(PluginFieldType::kFLOAT32);
    VALUE(PluginFieldType::kFLOAT64);
    VALUE(PluginFieldType::kINT8);
    VALUE(PluginFieldType::kINT16);
    VALUE(PluginFieldType::kINT32);
    VALUE(PluginFieldType::kCHAR);
    VALUE(PluginFieldType::kDIMS);
    VALUE(PluginFieldType::kUNKNOWN);
    VALUE(PluginFieldType::kBF16);
    VALUE(PluginFieldType::kINT64);
    VALUE(TensorRTPhase::kBUILD);
    VALUE(TensorRTPhase::kRUNTIME);
    VALUE(PluginCapabilityType::kCORE);
    VALUE(PluginCapabilityType::kBUILD);
    VALUE(PluginCapabilityType::kRUNTIME);
    VALUE(APILanguage::kCPP);
    VALUE(APILanguage::kPYTHON);
    VALUE(DimensionOperation::kSUM);
    VALUE(DimensionOperation::kPROD);
    VALUE(DimensionOperation::kMAX);
    VALUE(DimensionOperation::kMIN);
    VALUE(DimensionOperation::kSUB);
    VALUE(DimensionOperation::kEQUAL);
    VALUE(DimensionOperation::kLESS);
    VALUE(DimensionOperation::kFLOOR_DIV);
    VALUE(DimensionOperation::kCEIL_DIV);
    VALUE(Dims::MAX_DIMS);
    VALUE(IPluginV3OneBuild::kDEFAULT_FORMAT_COMBINATION_LIMIT);
    TYPE(DataType);
    TYPE(TensorFormat);
    TYPE(PluginFieldType);
    TYPE(TensorRTPhase);
    TYPE(PluginCapabilityType);
    TYPE(APILanguage);
    TYPE(DimensionOperation);
}

void structs() {
    TYPE(Dims);
    FIELD(Dims, nbDims);
    FIELD(Dims, d);
    TYPE(PluginTensorDesc);
    FIELD(PluginTensorDesc, dims);
    FIELD(PluginTensorDesc, type);
    FIELD(PluginTensorDesc, format);
    FIELD(PluginTensorDesc, scale);
    TYPE(DynamicPluginTensorDesc);
    FIELD(DynamicPluginTensorDesc, desc);
    FIELD(DynamicPluginTensorDesc, min);
    FIELD(DynamicPluginTensorDesc, max);
    FIELD(DynamicPluginTensorDesc, opt);
    TYPE(PluginField);
    FIELD(PluginField, name);
    FIELD(PluginField, data);
    FIELD(PluginField, type);
    FIELD(PluginField, length);
    TYPE(PluginFieldCollection);
    FIELD(PluginFieldCollection, nbFields);
    FIELD(PluginFieldCollection, fields);
    TYPE(InterfaceInfo);
    FIELD(InterfaceInfo, kind);
    FIELD(InterfaceInfo, major);
    FIELD(InterfaceInfo, minor);
    TYPE(DimsExprs);
    FIELD(DimsExprs, nbDims);
    FIELD(DimsExprs, d);
}

void plugin_interfaces() {
    TYPE(IVersionedInterface);
    SLOT(IVersionedInterface, getAPILanguage);
    SLOT(IVersionedInterface, getInterfaceInfo);
    TYPE(IPluginCapability);
    SLOT(IPluginCapability, getInterfaceInfo);
    TYPE(IPluginV3);
    SLOT(IPluginV3, getInterfaceInfo);
    SLOT(IPluginV3, getCapabilityInterface);
    SLOT(IPluginV3, clone);
    END(IPluginV3);
    INFO(IPluginV3);
    TYPE(v_1_0::IPluginV3OneCore);
    SLOT(v_1_0::IPluginV3OneCore, getInterfaceInfo);
    SLOT(v_1_0::IPluginV3OneCore, getPluginName);
    SLOT(v_1_0::IPluginV3OneCore, getPluginVersion);
    SLOT(v_1_0::IPluginV3OneCore, getPluginNamespace);
    END(v_1_0::IPluginV3OneCore);
    INFO(v_1_0::IPluginV3OneCore);
    TYPE(v_1_0::IPluginV3OneBuild);
    SLOT(v_1_0::IPluginV3OneBuild, getInterfaceInfo);
    SLOT(v_1_0::IPluginV3OneBuild, configurePlugin);
    SLOT(v_1_0::IPluginV3OneBuild, getOutputDataTypes);
    SLOT(v_1_0::IPluginV3OneBuild, getOutputShapes);
    SLOT(v_1_0::IPluginV3OneBuild, supportsFormatCombination);
    SLOT(v_1_0::IPluginV3OneBuild, getNbOutputs);
    SLOT(v_1_0::IPluginV3OneBuild, getWorkspaceSize);
    SLOT(v_1_0::IPluginV3OneBuild, getValidTactics);
    SLOT(v_1_0::IPluginV3OneBuild, getNbTactics);
    SLOT(v_1_0::IPluginV3OneBuild, getTimingCacheID);
    SLOT(v_1_0::IPluginV3OneBuild, getFormatCombinationLimit);
    SLOT(v_1_0::IPluginV3OneBuild, getMetadataString);
    END(v_1_0::IPluginV3OneBuild);
    INFO(v_1_0::IPluginV3OneBuild);
    TYPE(v_1_0::IPluginV3OneRuntime);
    SLOT(v_1_0::IPluginV3OneRuntime, getInterfaceInfo);
    SLOT(v_1_0::IPluginV3OneRuntime, setTactic);
    SLOT(v_1_0::IPluginV3OneRuntime, onShapeChange);
    SLOT(v_1_0::IPluginV3OneRuntime, enqueue);
    SLOT(v_1_0::IPluginV3OneRuntime, attachToContext);
    SLOT(v_1_0::IPluginV3OneRuntime, getFieldsToSerialize);
    END(v_1_0::IPluginV3OneRuntime);
    INFO(v_1_0::IPluginV3OneRuntime);
    TYPE(IPluginCreatorInterface);
    SLOT(IPluginCreatorInterface, getInterfaceInfo);
    TYPE(IPluginCreatorV3One);
    SLOT(IPluginCreatorV3One, getInterfaceInfo);
    SLOT(IPluginCreatorV3One, createPlugin);
    SLOT(IPluginCreatorV3One, getFieldNames);
    SLOT(IPluginCreatorV3One, getPluginName);
    SLOT(IPluginCreatorV3One, getPluginVersion);
    SLOT(IPluginCreatorV3One, getPluginNamespace);
    END(IPluginCreatorV3One);
    INFO(IPluginCreatorV3One);
}

// Only a derived class may name the protected pointer to the implementation.
struct OpenDimension : IDimensionExpr {
    static auto implementation() { return &OpenDimension::mImpl; }
};
struct OpenBuilder : IExprBuilder {
    static auto implementation() { return &OpenBuilder::mImpl; }
};

void shape_expressions() {
    TYPE(IDimensionExpr);
    TYPE(IExprBuilder);
    std::printf("field IDimensionExpr::mImpl: offset %ld\n", offset_of(OpenDimension::implementation()));
    std::printf("field IExprBuilder::mImpl: offset %ld\n", offset_of(OpenBuilder::implementation()));
    SLOT(apiv::VDimensionExpr, isConstant);
    SLOT(apiv::VDimensionExpr, getConstantValue);
    SLOT(apiv::VDimensionExpr, isSizeTensor);
    SLOT(apiv::VExprBuilder, constant);
    SLOT(apiv::VExprBuilder, operation);
    SLOT(apiv::VExprBuilder, declareSizeTensor);
}

template <typename AnyLogger, typename AnyFinder>
void logger() {
    VALUE(AnyLogger::Severity::kINTERNAL_ERROR);
    VALUE(AnyLogger::Severity::kERROR);
    VALUE(AnyLogger::Severity::kWARNING);
    VALUE(AnyLogger::Severity::kINFO);
    VALUE(AnyLogger::Severity::kVERBOSE);
    TYPE(AnyLogger);
    SLOT(AnyLogger, log);
    TYPE(AnyFinder);
    SLOT(AnyFinder, findLogger);
}

}  // namespace

int main() {
    data_types();
    structs();
    plugin_interfaces();
    shape_expressions();
#ifdef SHUNTYARD_PROBE_TENSORRT
    logger<ILogger, ILoggerFinder>();
#else
    prefix = "optional ";
    logger<ILogger, ILoggerFinder>();
    logger<v_1_0::ILogger, v_1_0::ILoggerFinder>();
#endif
    return 0;
}
